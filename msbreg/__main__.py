"""`python -m msbreg`, which torchrun can start: `torchrun --nproc-per-node 8 -m msbreg pretrain ...`."""

import sys

from msbreg.cli import main

sys.exit(main())
