"""msbreg's GPU kernels: Triton functions and their launchers, which know torch and triton and nothing of msbreg.

Importing this package needs neither triton nor a GPU; importing one of its modules needs triton.
"""
