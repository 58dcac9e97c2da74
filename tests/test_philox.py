import numpy as np
import pytest
import torch

from msbreg.philox import normals, philox4x32, uniforms


def numpy_philox4x32_10(counter, key):
    """Philox4x32-10 as in the paper's listing, on uint64 arrays of shape (4, n) and (2, n)."""
    c, k = [np.asarray(word, np.uint64) for word in counter], [np.asarray(word, np.uint64) for word in key]
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for round_number in range(10):
        if round_number:
            k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
        product_0, product_1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(product_1 >> shift) ^ c[1] ^ k[0], product_1 & low, (product_0 >> shift) ^ c[3] ^ k[1], product_0 & low]
    return np.stack(c)


# From kat_vectors of Random123: counter, key, output.
KNOWN = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    assert numpy_philox4x32_10(counter, key).tolist() == expected
    words = philox4x32(tuple(torch.tensor(c) for c in counter), key[0] | key[1] << 32)
    assert [word.item() for word in words] == expected


def random_words(*shape):
    return np.random.default_rng(0).integers(0, 2**32, shape, dtype=np.uint64)


def test_same_as_numpy_bit_for_bit():
    counter = random_words(4, 5000)
    for seed in (0, 1, 2**31, 2**32 + 7, 2**63 - 1):
        words = philox4x32(tuple(torch.from_numpy(c.astype(np.int64)) for c in counter), seed)
        expected = numpy_philox4x32_10(counter, [seed & 0xFFFFFFFF, seed >> 32])
        assert np.array_equal(torch.stack(words).numpy().astype(np.uint64), expected)


@pytest.mark.parametrize("seed", [0, 5, 2**32 + 7, -1, -(2**63)])
def test_seed_may_be_a_tensor(seed):
    counter = tuple(torch.arange(8) + i for i in range(4))
    as_int, as_tensor = philox4x32(counter, seed), philox4x32(counter, torch.tensor(seed))
    assert all(torch.equal(a, b) for a, b in zip(as_int, as_tensor, strict=True))


def test_counters_broadcast():
    c0, c1 = torch.arange(3), torch.arange(5)[:, None]
    zero = torch.zeros((), dtype=torch.int64)
    words = torch.stack(philox4x32((c0, c1, zero, zero), 9))
    full = torch.stack(philox4x32((c0.expand(5, 3), c1.expand(5, 3), zero.expand(5, 3), zero.expand(5, 3)), 9))
    assert words.shape == (4, 5, 3)
    assert torch.equal(words, full)


def test_uniforms_stay_inside_the_open_interval():
    ends = uniforms((torch.tensor([0, 2**32 - 1]),))[0]
    assert ends.dtype == torch.float32
    assert ends.double().tolist() == [2.0**-24, 1 - 2.0**-24]


def test_normals_are_box_muller_of_the_words():
    words = random_words(4, 4000)
    u = ((words >> np.uint64(9)) + 0.5) * 2.0**-23
    expected = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        expected += [np.sqrt(-2 * np.log(radius)) * f(2 * np.pi * angle) for f in (np.cos, np.sin)]
    got = torch.stack(normals(tuple(torch.from_numpy(w.astype(np.int64)) for w in words))).double().numpy()
    # float32 angles near 2π are 2e-7 apart, and log loses digits near one.
    assert np.abs(got - np.stack(expected)).max() < 5e-6
    assert np.abs(got).max() < 5.78
