import gc
import io
import itertools
import math
import os
import subprocess
import sys
import threading
import time
import warnings
import weakref

import numpy as np
import pytest

pytest.importorskip("PIL", reason="this needs the extra [train]")

import torch
from PIL import Image

from msbreg.data import ImageFolder, Source, View, ViewLoader, byol, cifar, evaluation, load_recipe, multi_crop
from msbreg.data.draws import LUMA, crop_boxes, draw, permutation
from msbreg.data.recipes import size_groups
from msbreg.errors import DataError, MSBRegError
from msbreg.philox import philox4x32, uniforms

try:
    import nvidia.dali  # noqa: F401

    BACKENDS = ["dali", "torchvision"]
except ImportError:
    BACKENDS = ["torchvision"]


def picture(seed, size=(40, 48)):
    """A smooth random picture of (height, width) as a JPEG file."""
    values = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize(size[::-1], Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """48 pictures in 4 classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(48):
        (folder / f"c{number % 4}").mkdir(exist_ok=True)
        (folder / f"c{number % 4}/{number:02d}.jpg").write_bytes(picture(number, (32 + number, 60 - number // 2)))
    return ImageFolder(folder)


def stream(source, recipe, batch_size, *, start=0, stop=None, **options):
    """The batches of steps [start, stop), and whether anything was left out."""
    loader = ViewLoader(source, recipe, batch_size, **{"threads": 1, **options})
    try:
        return list(loader.batches(start, stop))
    finally:
        loader.close()


def same(ours, theirs):
    return all(
        torch.equal(a.index, b.index)
        and torch.equal(a.labels, b.labels)
        and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_stream_does_not_depend_on_where_it_starts_or_on_threads(pictures, backend):
    recipe = (*byol(2, 32), View(size=24, area=(0.05, 0.2), blur=0.5))
    whole = stream(pictures, recipe, 10, stop=20, seed=5, backend=backend)
    assert same(whole[17:], stream(pictures, recipe, 10, start=17, stop=20, seed=5, backend=backend, threads=3))
    assert same(whole[:3], stream(pictures, recipe, 10, stop=3, seed=5, backend=backend, prefetch=5, threads=3))
    assert not same(whole[:3], stream(pictures, recipe, 10, start=4, stop=7, seed=5, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_stream_does_not_depend_on_torchs_default_device(pictures, backend):
    whole = stream(pictures, cifar(2, 24), 10, stop=6, backend=backend)
    with torch.device("meta"):  # as `torch.set_default_device` does for good
        again = stream(pictures, cifar(2, 24), 10, stop=6, backend=backend)
    assert same(whole, again)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_batches_joined_are_the_batches_of_one_process(pictures, backend, world):
    recipe = cifar(3, 24)
    whole = stream(pictures, recipe, 20, start=1, stop=4, seed=1, backend=backend)
    ranks = [
        stream(pictures, recipe, 20 // world, start=1, stop=4, seed=1, backend=backend, rank=rank, world_size=world)
        for rank in range(world)
    ]
    for step, batch in enumerate(whole):
        parts = [rank[step] for rank in ranks]
        assert torch.equal(batch.index, torch.cat([part.index for part in parts]))
        assert torch.equal(batch.labels, torch.cat([part.labels for part in parts]))
        views = torch.cat([part.views[0].unflatten(0, (3, -1)) for part in parts], dim=1)
        assert torch.equal(batch.views[0].unflatten(0, (3, -1)), views)


def test_a_process_among_others_has_its_own_images_unless_told_otherwise(pictures, monkeypatch):
    options = {"stop": 3, "backend": "torchvision"}
    second = stream(pictures, cifar(1, 16), 8, rank=1, world_size=2, **options)
    alone = stream(pictures, cifar(1, 16), 8, rank=0, world_size=1, **options)
    held_out = stream(pictures, evaluation(16), 8, shuffle=False, backend="torchvision")
    early = ViewLoader(pictures, cifar(1, 16), 8, backend="torchvision", threads=1)
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    with early, pytest.warns(UserWarning, match="made before init_process_group, so that every process has the same"):
        early.batches()
    assert same(second, stream(pictures, cifar(1, 16), 8, **options))
    assert same(alone, stream(pictures, cifar(1, 16), 8, rank=0, world_size=1, **options))
    assert same(held_out, stream(pictures, evaluation(16), 8, shuffle=False, backend="torchvision"))


@pytest.mark.parametrize(("processes", "threads"), [(1, 12), (4, 3), (5, 2), (16, 1)])
def test_processes_on_one_machine_share_its_cores(pictures, monkeypatch, processes, threads):
    monkeypatch.setattr("msbreg.data.loader.usable_cores", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with ViewLoader(pictures, cifar(1, 16), 8, backend="torchvision") as loader:
        assert loader.threads == threads
    with ViewLoader(pictures, cifar(1, 16), 8, backend="torchvision", threads=7) as loader:
        assert loader.threads == 7


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_differ_in_order_and_in_pixels(pictures, backend):
    one, two = (stream(pictures, cifar(2, 24), 48, stop=1, seed=seed, backend=backend)[0] for seed in (0, 1))
    assert not torch.equal(one.index, two.index)
    ours, theirs = (batch.views[0][:48][batch.index.argsort()] for batch in (one, two))
    assert (ours - theirs).abs().flatten(1).amax(1).min() > 0.01


def test_an_epoch_has_every_image_once_and_the_next_one_another_order(pictures):
    batches = stream(pictures, cifar(1, 8), 12, stop=8, backend="torchvision")
    first, second = (torch.cat([batch.index for batch in batches[at : at + 4]]) for at in (0, 4))
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(48))
    assert not torch.equal(first, second)
    for batch in batches:
        assert torch.equal(batch.labels, torch.from_numpy(pictures.labels)[batch.index])


def test_the_rest_of_an_epoch_is_left_out_and_it_is_another_rest_each_time(pictures):
    loader = ViewLoader(pictures, cifar(1, 8), 10, backend="torchvision")
    assert loader.steps_per_epoch == 4
    epochs = [
        torch.cat([batch.index for batch in loader.batches(4 * epoch, 4 * epoch + 4)]).tolist() for epoch in range(3)
    ]
    loader.close()
    assert all(len(set(epoch)) == 40 for epoch in epochs)
    assert set(epochs[0]) != set(epochs[1]) != set(epochs[2])


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_is_an_iterable_with_a_length(pictures, shuffle):
    with ViewLoader(pictures, cifar(1, 8), 10, shuffle=shuffle, backend="torchvision", threads=1) as loader:
        length = loader.steps_per_epoch
        whole = list(loader.batches(0, 3 * length))
        for number in (2, 0):
            epoch = loader.epoch(number)
            assert len(epoch) == length == (4 if shuffle else 5)
            assert same(whole[number * length :][:length] if shuffle else whole, list(epoch))
        assert same(list(epoch), list(epoch))
        with pytest.raises(ValueError, match="expected number of 0 or more, got -1"):
            loader.epoch(-1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_shuffle_the_images_come_once_in_order(pictures, backend):
    loader = ViewLoader(pictures, evaluation(24), 20, shuffle=False, backend=backend, threads=1)
    for _ in range(2):
        batches = list(loader.batches())
        assert [len(batch.index) for batch in batches] == [20, 20, 8] and loader.steps_per_epoch == 3
        assert torch.cat([batch.index for batch in batches]).tolist() == list(range(48))
        assert batches[2].views[0].shape == (8, 3, 24, 24)
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_grouped_by_size_view_after_view_in_channels_last(pictures, backend):
    plain = evaluation(24)[0]
    mirrored = View(**{**vars(plain), "flip": 1.0})
    small = View(**{**vars(plain), "size": 16})
    batch = stream(pictures, (plain, small, mirrored), 6, stop=1, backend=backend)[0]
    large, little = batch.views
    assert large.shape == (12, 3, 24, 24) and little.shape == (6, 3, 16, 16)
    for views in batch.views:
        assert views.dtype == torch.float32 and views.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(large[:6].flip(-1), large[6:])
    expected = stream(pictures.subset(batch.index.numpy()), (plain,), 6, shuffle=False, backend=backend)[0]
    assert torch.equal(large[:6], expected.views[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_later_batches_do_not_write_to_earlier_ones(pictures, backend):
    loader = ViewLoader(pictures, (View(size=24), View(size=16)), 8, backend=backend, threads=2)
    batches = loader.batches()
    kept = list(itertools.islice(batches, 4))
    copies = [[views.clone() for views in batch.views] for batch in kept]
    for _ in range(12):
        next(batches)
    loader.close()
    for batch, copy in zip(kept, copies, strict=True):
        assert all(torch.equal(views, earlier) for views, earlier in zip(batch.views, copy, strict=True))
    addresses = {views.data_ptr() for batch in kept for views in batch.views}
    assert len(addresses) == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_normalised_by_imagenets_statistics(tmp_path, backend):
    for number, colour in enumerate([(0, 128, 255), (255, 0, 64)]):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{number}.png")
    views = stream(ImageFolder(tmp_path), evaluation(16), 2, shuffle=False, backend=backend)[0].views[0]
    expected = (torch.tensor([[0, 128, 255], [255, 0, 64]]) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    assert torch.allclose(views, expected[:, :, None, None].expand_as(views), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_solarize_inverts_values_from_128_on(tmp_path, backend):
    for number, value in enumerate([0, 127, 128, 255]):
        Image.new("RGB", (20, 20), (value,) * 3).save(tmp_path / f"{number}.png")
    view = View(**{**vars(evaluation(16)[0]), "solarize": 1.0})
    red = stream(ImageFolder(tmp_path), (view,), 4, shuffle=False, backend=backend)[0].views[0][:, 0, 5, 5]
    assert (255 * (red * 0.229 + 0.485)).round().tolist() == [0, 127, 127, 0]


def damaged_png():
    """Whole from header to end marker, but its pixels cannot be decompressed."""
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 50).convert("RGB").save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    middle = len(data) // 2
    data[middle : middle + 60] = bytes(60)
    return bytes(data)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_images_among_good_ones_are_named_once_replaced_and_counted(tmp_path, backend):
    bad = {3: picture(3)[:-200], 4: b"just a text", 9: b"", 12: damaged_png()}
    for number in range(16):
        name = f"{number:02d}.{'png' if number == 12 else 'jpg'}"
        (tmp_path / name).write_bytes(bad.get(number, picture(number)))
    source = ImageFolder(tmp_path)
    loader = ViewLoader(source, cifar(2, 24), 8, backend=backend, threads=2)
    with pytest.warns(UserWarning, match="left out") as caught:
        batches = list(loader.batches(0, 6))
    messages = [str(warning.message) for warning in caught]
    assert {warning.filename for warning in caught} == {__file__}  # who asks for batches is told where
    assert sorted(loader.unreadable) == sorted(bad)
    assert {type(number) for number in loader.unreadable} == {int}  # a checkpoint holds no numbers of NumPy's
    for number in bad:
        assert len([message for message in messages if source.name(number) in message]) == 1
    substitutes = {3: 2, 4: 15, 9: 0, 12: 5}
    for step, batch in enumerate(batches):
        order = permutation(16, seed=0, epoch=step // 2)[8 * (step % 2) :][:8]
        assert batch.index.tolist() == [substitutes.get(number, number) for number in order.tolist()]

    with warnings.catch_warnings():  # nothing is named again
        warnings.simplefilter("error")
        again = list(loader.batches(0, 6))
    loader.close()
    assert same(batches, again)


@pytest.mark.skipif("dali" not in BACKENDS, reason="DALI is not installed")
@pytest.mark.parametrize(
    ("asked", "recipe", "made_by"),
    [
        ("auto", cifar(2, 32), "DaliBackend"),
        ("auto", byol(2, 127), "DaliBackend"),
        ("auto", byol(2, 128), "TorchvisionBackend"),
        ("auto", multi_crop(2, 2, size=128, local_size=32), "TorchvisionBackend"),
        ("dali", byol(2, 224), "DaliBackend"),
        ("torchvision", cifar(2, 32), "TorchvisionBackend"),
    ],
)
def test_a_cpu_has_the_backend_that_is_faster_there(pictures, asked, recipe, made_by):
    loader = ViewLoader(pictures, recipe, 2, backend=asked, threads=1)
    loader.close()
    assert type(loader._backend).__name__ == made_by


def test_a_loader_says_what_it_was_to_be_given(pictures):
    with pytest.raises(TypeError, match=r"got a path: use open_source\('photos'\)"):
        ViewLoader("photos", cifar(2, 24), 4)
    with pytest.raises(TypeError, match=r"expected a source of images, got list: .* subclass of msbreg.data.Source"):
        ViewLoader([picture(0)], cifar(2, 24), 1)
    with pytest.raises(TypeError, match=r"got 'byol': use load_recipe\('byol', views, size\)"):
        ViewLoader(pictures, "byol", 4)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"cannot be made on cuda, since torch sees no GPU here"):
            ViewLoader(pictures, cifar(2, 24), 4, device="cuda")


def test_a_loader_closes_itself_behind_a_block(pictures):
    with ViewLoader(pictures, cifar(2, 24), 4, threads=1) as loader:
        next(loader.batches())
    with pytest.raises(RuntimeError, match="the loader is closed"):
        loader.batches()


def test_without_its_extra_the_data_package_says_how_to_get_it():
    program = "import sys; sys.modules['PIL'] = None; import msbreg.data"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "ImportError: msbreg.data needs PIL: pip install 'msbreg[train]'" in done.stderr


ODD_HEADER = """
import sys
from msbreg.data import ImageFolder, ViewLoader, evaluation
loader = ViewLoader(ImageFolder(sys.argv[1]), evaluation(24), 64, shuffle=False, backend=sys.argv[2], threads=1)
print(len(list(loader.batches())), loader.unreadable)
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_jpeg_with_an_odd_header_does_not_end_the_process(tmp_path, backend):
    """As DALI 2.4 does in large batches, on a CPU, with what Pillow overlooks: bytes between two segments."""
    for number in range(64):
        data = picture(number)
        tables = data.index(b"\xff\xc4")
        data = data[:tables] + bytes(3) + data[tables:] if number == 0 else data
        (tmp_path / f"{number:02d}.jpg").write_bytes(data)
    command = [sys.executable, "-c", ODD_HEADER, str(tmp_path), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1 {}\n"), done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_backend_turns_what_pillow_takes_for_upright(tmp_path, backend):
    """EXIF orientation 6 as a BYTE: DALI would follow it, Pillow does not."""
    exif = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\1\0\1\0\0\0\6\0\0\0\0\0\0\0"
    data = picture(0, (40, 40))
    (tmp_path / "0.jpg").write_bytes(data)
    (tmp_path / "1.jpg").write_bytes(data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:])
    upright, turned = stream(ImageFolder(tmp_path), evaluation(16), 2, shuffle=False, backend=backend)[0].views[0]
    assert torch.equal(upright, turned)


MUTATED_HEADERS = """
import io, random, struct, sys, warnings, zlib
import numpy as np
import torch
from PIL import Image
from msbreg.data.dali_backend import _decode, _pipeline
from msbreg.data.images import UnreadableError, probe

def made():
    pipeline = _pipeline(64, torch.device("cpu"), threads=2)
    with pipeline:
        pipeline.set_outputs(_decode(torch.device("cpu")))
    pipeline.build()
    return pipeline

def with_checksums(png):
    place = 8
    while place + 12 <= len(png):
        end = place + 8 + int.from_bytes(png[place : place + 4], "big")
        png[end : end + 4] = struct.pack(">I", zlib.crc32(png[place + 4 : end]))
        place = end + 4

kind, count = sys.argv[1], int(sys.argv[2])
buffer, exif, random = io.BytesIO(), Image.Exif(), random.Random(0)
exif[0x0112], exif[0x010F] = 1, "a camera"
options = {"exif": exif} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
kind = "JPEG" if kind == "JFIF" else kind
Image.effect_noise((32, 24), 50).convert("P" if kind == "PNG" else "RGB").save(buffer, kind, **options)
whole, decoded, pipeline = buffer.getvalue(), 0, made()
warnings.simplefilter("ignore")
header = {"JPEG": whole.find(bytes((0xFF, 0xDA))) + 14, "PNG": whole.find(b"IDAT") + 4, "WEBP": 30}[kind]
for _ in range(count):
    data = bytearray(whole)
    for _ in range(random.choice((1, 1, 2, 3))):
        place = random.randrange(2, header)
        new = [random.randrange(256)] * random.randrange(3)
        data[place : place + random.randrange(2)] = bytes(new)
    if kind == "PNG":
        with_checksums(data)
    try:
        size = probe(bytes(data))
    except UnreadableError:
        continue
    if size is not None:
        files = [np.frombuffer(file, np.uint8) for file in (bytes(data), *[whole] * 63)]
        pipeline.feed_input("encoded", files)
        try:
            (images,) = pipeline.run()
        except RuntimeError:
            pipeline = made()
            continue
        decoded += 1
        assert images.at(0).shape == (*size, 3), (images.at(0).shape, size)
print(decoded)
"""


@pytest.mark.skipif("dali" not in BACKENDS, reason="DALI is not installed")
@pytest.mark.parametrize(("kind", "count"), [("JPEG", 1200), ("JFIF", 800), ("PNG", 600), ("WEBP", 900)])
def test_no_mutated_header_ends_the_process(kind, count):
    command = [sys.executable, "-c", MUTATED_HEADERS, kind, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and int(done.stdout) > 50, (done.returncode, done.stdout, done.stderr[-500:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_substitutes_do_not_depend_on_ranks_or_on_what_was_found_before(tmp_path, backend):
    for number in range(12):
        name = f"{number:02d}.{'png' if number == 5 else 'jpg'}"
        (tmp_path / name).write_bytes({5: damaged_png(), 6: b"x"}.get(number, picture(number)))
    source = ImageFolder(tmp_path)
    with pytest.warns(UserWarning, match="left out"):
        whole = stream(source, cifar(1, 24), 6, stop=5, backend=backend)
    with pytest.warns(UserWarning, match="left out"):
        ranks = [stream(source, cifar(1, 24), 3, stop=5, backend=backend, rank=r, world_size=2) for r in range(2)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.views[0], torch.cat([rank[step].views[0] for rank in ranks]))
    with pytest.warns(UserWarning, match="left out"):
        assert same(whole[3:], stream(source, cifar(1, 24), 6, start=3, stop=5, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_that_only_pillow_decodes_are_not_left_out(tmp_path, backend):
    for number in range(4):
        Image.open(io.BytesIO(picture(number))).save(tmp_path / f"{number}.gif")
    (tmp_path / "4.png").write_bytes(cut_png(4))
    loader = ViewLoader(ImageFolder(tmp_path), evaluation(24), 5, shuffle=False, backend=backend, threads=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = next(loader.batches())
    loader.close()
    assert batch.index.tolist() == [0, 1, 2, 3, 4] and loader.unreadable == {}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [b"x", damaged_png()], ids=["text", "damaged"])
@pytest.mark.parametrize("count", [4, 40])
def test_nothing_but_bad_images_ends_with_an_error(tmp_path, backend, bad, count):
    for number in range(count):
        (tmp_path / f"{number:02d}.png").write_bytes(bad)
    loader = ViewLoader(ImageFolder(tmp_path), evaluation(24), 4, shuffle=False, backend=backend, threads=1)
    with pytest.raises(DataError, match=r"none of the 4 images|1\d of the 40 images|20 of the 40 images"):
        list(loader.batches())
    loader.close()


def cut_png(seed):
    """All pixels, but neither checksum nor end marker: Pillow decodes it, DALI does not."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture(seed))).save(buffer, "PNG")
    return buffer.getvalue()[:-14]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_that_only_pillow_decodes_may_be_in_several_batches_under_way(tmp_path, backend):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(cut_png(number))
    loader = ViewLoader(ImageFolder(tmp_path), cifar(1, 24), 2, backend=backend, threads=1, prefetch=3)
    assert [sorted(batch.index.tolist()) for batch in loader.batches(0, 6)] == 6 * [[0, 1]]
    assert loader.unreadable == {}
    loader.close()


@pytest.mark.skipif("dali" not in BACKENDS, reason="DALI is not installed")
def test_a_decoder_out_of_order_is_not_the_images_fault(pictures, monkeypatch):
    """DALI itself, but given two bytes of each file alone; as where a GPU has no memory left, it decodes nothing."""
    from nvidia.dali import fn, types

    import msbreg.data.dali_backend as dali

    def decode(device: torch.device):
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        return fn.decoders.image(encoded[:2], output_type=types.RGB)

    monkeypatch.setattr(dali, "_decode", decode)
    loader = ViewLoader(pictures, cifar(1, 24), 24, backend="dali", threads=1)
    with pytest.raises(RuntimeError, match="decod"):
        next(loader.batches())
    assert loader.unreadable == {}
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_unreadable_images_of_an_earlier_run_may_be_told(pictures, backend):
    loader = ViewLoader(pictures, evaluation(16), 48, shuffle=False, backend=backend, threads=1)
    loader.unreadable.update({2: "told", 3: "told"})
    images = next(loader.batches()).index.tolist()
    assert images[:2] == [0, 1] and images[4:] == [*range(4, 48)] and not {2, 3} & set(images)
    loader.close()


def test_a_batch_larger_than_the_data_set(pictures):
    with pytest.raises(
        DataError, match=r"a batch of 49 images cannot be filled from the 48 of .*; use a smaller batch"
    ):
        ViewLoader(pictures, cifar(2), 49)
    with pytest.raises(
        DataError, match=r"batch of 64 images \(16 on each of 4 processes\) cannot be filled from the 48"
    ):
        ViewLoader(pictures, cifar(2), 16, rank=0, world_size=4)
    loader = ViewLoader(pictures, evaluation(8), 64, shuffle=False, backend="torchvision")
    assert [len(batch.index) for batch in loader.batches()] == [48]
    loader.close()


@pytest.mark.parametrize("shuffle", [True, False])
def test_there_is_no_step_before_the_first(pictures, shuffle):
    loader = ViewLoader(pictures, cifar(1, 8), 8, shuffle=shuffle, backend="torchvision", threads=1)
    with pytest.raises(ValueError, match="expected start of 0 or more, got -1"):
        loader.batches(-1)
    for wrong in ((1.0,), (0, 2.5), ("1",)):
        with pytest.raises(TypeError, match="to be a whole number"):
            loader.batches(*wrong)
    loader.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"prefetch": 0},
        {"rank": 2, "world_size": 2},
        {"world_size": 2},
        {"rank": 0},
        {"shuffle": False, "rank": 0, "world_size": 2},
        {"seed": 2**64},
        {"threads": 0},
        {"threads": -1},
        {"timeout": -1},
        {"timeout": math.nan},
        {"device": "mps"},
        {"device": "meta"},
        {"backend": "cv"},
    ],
)
def test_impossible_arguments(pictures, wrong):
    with pytest.raises(ValueError, match=r"expected|backend"):
        ViewLoader(pictures, cifar(2), **{"batch_size": 4, **wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        {"recipe": View()},
        {"recipe": byol},
        {"recipe": ()},
        {"batch_size": 8.5},
        {"batch_size": True},
        {"seed": 1.5},
        {"seed": None},
        {"prefetch": "2"},
        {"threads": 1.5},
        {"rank": 0.0, "world_size": 2},
        {"dtype": "float32"},
        {"timeout": "600"},
    ],
)
def test_arguments_of_another_kind(pictures, wrong):
    with pytest.raises(TypeError, match=rf"expected (a )?{next(iter(wrong))}\b"):
        ViewLoader(pictures, **{"recipe": cifar(2), "batch_size": 4, **wrong})


def test_one_image_at_a_time(pictures):
    batches = stream(pictures, cifar(1, 8), 1, stop=3, backend="torchvision", prefetch=1)
    assert [batch.views[0].shape for batch in batches] == 3 * [(1, 3, 8, 8)]


def test_without_dali_torchvision_takes_its_place(pictures, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.warns(UserWarning, match="DALI cannot be imported .*, so torchvision decodes and augments"):
        batch = stream(pictures, cifar(1, 16), 4, stop=1, backend="auto")[0]
    assert same([batch], stream(pictures, cifar(1, 16), 4, stop=1, backend="torchvision"))
    with pytest.raises(MSBRegError, match="DALI cannot be imported"):
        ViewLoader(pictures, cifar(1, 16), 4, backend="dali")


@pytest.mark.parametrize("backend", ["auto", "torchvision"])
@pytest.mark.parametrize("size", [16, 128])
def test_without_either_a_loader_says_what_to_install(pictures, monkeypatch, backend, size):
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "msbreg.data.torchvision_backend", raising=False)
    for name in ("nvidia.dali", "torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, None)
    says = r"torchvision .*; install them with pip install 'msbreg\[train\]'"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of which there is none that torchvision takes its place
        with pytest.raises(MSBRegError, match=says):
            ViewLoader(pictures, cifar(1, size), 4, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_stream_ends_the_one_before(pictures, backend):
    loader = ViewLoader(pictures, cifar(1, 16), 8, backend=backend, threads=1)
    first = loader.batches()
    one = next(first)
    again = next(loader.batches())
    assert same([one], [again])
    with pytest.raises(RuntimeError, match="ended when the loader was asked for others"):
        next(first)
    whole = loader.batches(0, 2)
    last = loader.batches(0, len(list(whole)))
    assert next(whole, None) is None  # as of any iterator that has come to its end
    next(last)
    loader.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the loader is closed"):
            next(last)
    loader.close()


def test_a_stream_that_was_interrupted_does_not_pass_for_a_whole_one(pictures, monkeypatch):
    loader = ViewLoader(pictures, cifar(1, 16), 8, backend="torchvision", threads=1)
    batches, receive = loader.batches(0, 4), loader._backend.receive

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(loader._backend, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    monkeypatch.setattr(loader._backend, "receive", receive)
    with pytest.raises(RuntimeError, match="these batches ended with KeyboardInterrupt; ask the loader for those"):
        next(batches)
    assert len(list(loader.batches(0, 4))) == 4
    loader.close()


def test_closing_ends_all_threads_of_a_loader_that_was_used_and_of_one_that_was_not(pictures):
    before = set(threading.enumerate())
    loaders = [ViewLoader(pictures, cifar(1, 16), 8, backend="torchvision", threads=2) for _ in range(2)]
    next(loaders[0].batches())
    assert len(set(threading.enumerate()) - before) > 2 * (8 + 1)
    for loader in loaders:
        loader.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def what_comes_of(batches):
    """The next batch, or what is said instead."""
    try:
        return next(batches)
    except RuntimeError as error:
        return str(error)


class Held(Source):
    """Pictures in memory."""

    def __init__(self, labels, made=bytes):
        self.labels, self.made = labels, made

    def read(self, index):
        return self.made(picture(index))

    def name(self, index):
        return f"picture {index}"

    def __str__(self):
        return "pictures held"


@pytest.mark.parametrize("made", [bytes, bytearray, memoryview])
@pytest.mark.parametrize("labels", [[3, -1, 5, 7], torch.tensor([3, -1, 5, 7]), np.array([3, -1, 5, 7], np.int8)])
def test_a_source_of_ones_own_is_subclassed_in_a_few_lines(labels, made):
    source = Held(labels, made)
    for part, expected in ((source, [3, -1, 5, 7]), (source.subset([2, 0]), [5, 3])):
        batch = stream(part, evaluation(16), 4, shuffle=False, backend="torchvision")[0]
        assert batch.labels.tolist() == expected and batch.labels.dtype == torch.int64
    assert source.fingerprint() == Held(np.array([3, -1, 5, 7])).fingerprint()


@pytest.mark.parametrize("labels", [["a", "b"], np.zeros(2, np.float32), np.zeros((2, 3), np.int64), [None, None]])
def test_labels_are_whole_numbers(labels):
    with pytest.raises(TypeError, match="expected the labels of pictures held to be 2 whole numbers, -1 where unknown"):
        ViewLoader(Held(labels), cifar(2, 24), 2)


def test_what_a_source_reads_are_the_bytes_of_a_file():
    decoded = Held([0, 0], lambda data: Image.open(io.BytesIO(data)))
    with pytest.raises(TypeError, match=r"encoded bytes of picture \d from Source.read, got JpegImageFile"):
        stream(decoded, cifar(2, 24), 2, stop=1)
    missing = Held([0, 0], lambda data: {}["image"])
    with pytest.raises(RuntimeError, match=r"picture \d was not read, for KeyError: 'image'"):
        stream(missing, cifar(2, 24), 2, stop=1)


class Slow(Source):
    """Pictures that are handed out only once `go` is set."""

    def __init__(self, source):
        self.source, self.labels, self.classes = source, source.labels, source.classes
        self.asked, self.go = threading.Event(), threading.Event()

    def read(self, index):
        self.asked.set()
        assert self.go.wait(60)
        return self.source.read(index)

    def name(self, index):
        return self.source.name(index)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_from_another_thread_ends_the_stream_and_frees_all(pictures, backend):
    before = set(threading.enumerate())
    source, ended = Slow(pictures), []
    loader = ViewLoader(source, cifar(1, 16), 8, backend=backend, threads=1)
    batches = loader.batches()
    waiting = threading.Thread(target=lambda: ended.append(what_comes_of(batches)))
    waiting.start()
    assert source.asked.wait(60)
    loader.close()
    waiting.join(10)  # though the image that it waits for still stalls
    assert ended == ["the loader is closed"]
    source.go.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("backend", BACKENDS)
def test_closing_a_stream_that_another_thread_goes_through(pictures, backend):
    loader = ViewLoader(pictures, cifar(1, 16), 8, backend=backend, threads=1)
    batches, errors, begun = loader.batches(), [], threading.Event()

    def go_through():
        try:
            for _ in batches:
                begun.set()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=go_through)
    thread.start()
    assert begun.wait(60)
    loader.close()
    thread.join(60)
    assert not thread.is_alive() and errors == ["the loader is closed"]


def test_a_thread_that_asks_for_a_batch_of_a_stream_that_is_being_closed(pictures, monkeypatch):
    loader = ViewLoader(pictures, cifar(1, 16), 8, backend="torchvision", threads=1)
    batches, got, closing, asks = loader.batches(), [], threading.Event(), threading.Event()
    next(batches)

    def ask():
        assert closing.wait(60)
        asks.set()
        got.append(what_comes_of(batches))

    discard = loader._backend.discard

    def discard_while_it_asks():
        closing.set()
        assert asks.wait(60)
        asking.join(0.5)  # it asks by then, and has to wait
        discard()

    monkeypatch.setattr(loader._backend, "discard", discard_while_it_asks)
    asking = threading.Thread(target=ask)
    asking.start()
    loader.close()
    asking.join(60)
    assert got == ["the loader is closed"]


def test_a_stream_is_not_taken_from_a_thread_that_waits_for_it(pictures):
    source = Slow(pictures)
    loader = ViewLoader(source, cifar(1, 16), 8, backend="torchvision", threads=1)
    batches, got = loader.batches(), []
    waiting = threading.Thread(target=lambda: got.append(next(batches)))
    waiting.start()
    assert source.asked.wait(60)
    with pytest.raises(RuntimeError, match="another thread waits for a batch"):
        loader.batches()
    source.go.set()
    waiting.join(60)
    assert len(got) == 1
    loader.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_loader_of_another_process_is_an_error(pictures):
    loader = ViewLoader(pictures, cifar(1, 16), 8, backend="torchvision", threads=1, timeout=10)
    child = os.fork()
    if child == 0:
        try:
            next(loader.batches())
            os._exit(1)
        except RuntimeError as error:
            os._exit(0 if "make it in the process that uses it" in str(error) else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    loader.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_nor_does_a_fork_wait_for_a_thread_that_it_does_not_have(pictures):
    source = Slow(pictures)
    loader = ViewLoader(source, cifar(1, 16), 8, backend="torchvision", threads=1)
    batches = loader.batches()
    waiting = threading.Thread(target=lambda: next(batches))
    waiting.start()
    assert source.asked.wait(60)
    child = os.fork()
    if child == 0:
        said = 0
        for ask in (lambda: next(batches), loader.batches):
            try:
                ask()
            except RuntimeError as error:
                said += "make it in the process that uses it" in str(error)
        os._exit(said)
    source.go.set()
    waiting.join(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    loader.close()


FORKS = """
import gc, os, sys, threading, time
from concurrent.futures import Future
import torch
from msbreg.data import ImageFolder, ViewLoader, byol

class Garbage(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, number):
        gc.collect()
        return number

def begun():
    loader = ViewLoader(ImageFolder(sys.argv[1]), byol(2, 16), 8, backend=sys.argv[2], threads=2)
    batches = loader.batches()
    next(batches)
    return loader, batches

gc.disable()
left, going = begun()
left.itself = left, going  # as where a trainer and its loader refer to each other
del left, going
print("workers", len(list(torch.utils.data.DataLoader(Garbage(), num_workers=1, timeout=20))), flush=True)

loader, batches = begun()
locked = threading.Event()
def lock_all():  # as may be at any moment: threads take these locks now and then
    for threads in (loader._reading, loader._drawing, loader._ordering):
        threads._crew._changed.acquire()
    for future in [each for each in gc.get_objects() if isinstance(each, Future)]:
        future._condition.acquire()
    locked.set()
    time.sleep(600)
threading.Thread(target=lock_all, daemon=True).start()
assert locked.wait(10)
for way in ("close", "forget", "exit"):
    if (child := os.fork()) == 0:
        if way == "close":
            loader.close()
        elif way == "forget":
            del loader, batches
            gc.collect()
        sys.exit()
    until = time.monotonic() + 20
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < until:
        time.sleep(0.01)
    if not ended[0]:
        os.kill(child, 9)
    print(way, "ended" if ended == (child, 0) else "failed" if ended[0] else "hangs", flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("backend", BACKENDS)
def test_forks_neither_crash_nor_hang_for_a_loader_that_was_left_open(pictures, backend):
    """As torch's DataLoader makes them. DALI frees nothing without its threads, and a lock may be taken for ever."""
    command = [sys.executable, "-c", FORKS, str(pictures.folder), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "workers 8\nclose ended\nforget ended\nexit ended\n", done.stdout + done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loader_that_is_no_longer_used_is_freed_at_once(pictures, backend):
    stream(pictures, cifar(1, 16), 8, stop=1, backend=backend)  # which imports modules, whose own garbage holds frames
    gc.collect()
    gc.disable()
    try:
        loader = ViewLoader(pictures, cifar(1, 16), 8, backend=backend, threads=1)
        for _ in loader.batches():
            break
        freed, until = weakref.ref(loader), time.monotonic() + 10
        del loader
        while freed() and time.monotonic() < until:  # a thread may be reading for it
            time.sleep(0.01)
        assert freed() is None
    finally:
        gc.enable()


def test_permutations_are_permutations_and_have_no_favourites():
    counts = np.zeros((6, 6))
    for epoch in range(1000):
        order = permutation(6, seed=7, epoch=epoch)
        counts[np.arange(6), order] += 1
    assert (counts.sum(0) == 1000).all()
    expected, sigma = 1000 / 6, math.sqrt(1000 * (1 / 6) * (5 / 6))
    assert np.abs(counts - expected).max() < 5 * sigma
    assert len({tuple(permutation(20, seed=seed, epoch=epoch)) for seed in range(5) for epoch in range(5)}) == 25


def test_draws_come_from_the_documented_counters():
    sample, view, seed = 2**33 + 12345, 3, 2**40 + 9
    recipe = tuple(View(size=8, flip=0.5, solarize=0.5) for _ in range(5))
    ordinals = np.array([7, sample], dtype=np.int64)
    drawn = draw(recipe, ordinals, np.array([[50, 60], [70, 90]]), seed=seed)[view]

    def uniform(number):
        counter = [torch.tensor(word) for word in (number // 4, sample & 0xFFFFFFFF, sample >> 32, 2**31 + view)]
        return float(uniforms(philox4x32(tuple(counter), seed))[number % 4])

    assert drawn.sigma[1] == np.float32(0.1 + 1.9 * uniform(29))
    assert drawn.solarize[1] == (uniform(30) < 0.5) and drawn.flip[1] == (uniform(31) < 0.5)
    assert drawn.box[1, 0] == math.floor(uniform(20) * (70 - drawn.box[1, 2] + 1))


def test_a_samples_draw_does_not_depend_on_its_batch():
    sizes = np.random.default_rng(0).integers(20, 500, (64, 2))
    whole = draw(byol(3), np.arange(64), sizes, seed=0)
    part = draw(byol(3), np.arange(20, 30), sizes[20:30], seed=0)
    for ours, theirs in zip(whole, part, strict=True):
        assert all(np.array_equal(a[20:30], b) for a, b in zip(ours, theirs, strict=True))
    assert len(np.unique([view.sigma[:10] for view in draw(byol(3), np.arange(64), sizes, seed=1)[::2]])) == 20


@pytest.mark.parametrize(
    "view", [*byol(1), *multi_crop(1, 1), *evaluation(224), *evaluation(32), View(ratio=(0.2, 0.3))]
)
def test_crops_lie_inside_the_image(view):
    sides = [1, 2, 3, 7, 50, 333, 4000]
    sizes = np.array([(height, width) for height in sides for width in sides] * 40)
    top, left, height, width = draw((view,), np.arange(len(sizes)), sizes, seed=0)[0].box.T
    assert (height >= 1).all() and (width >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + height <= sizes[:, 0]).all() and (left + width <= sizes[:, 1]).all()


def reference_crop(view, u, height, width):
    """RandomResizedCrop as one reads it: attempt after attempt."""
    low, high = math.log(view.ratio[0]), math.log(view.ratio[1])
    for attempt in range(10):
        area = height * width * (view.area[0] + (view.area[1] - view.area[0]) * u[attempt])
        ratio = math.exp(low + (high - low) * u[10 + attempt])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return [int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w]
    if width / height < view.ratio[0]:
        w, h = width, round(width / view.ratio[0])
    elif width / height > view.ratio[1]:
        w, h = round(height * view.ratio[1]), height
    else:
        w, h = width, height
    return [(height - h) // 2, (width - w) // 2, h, w]


@pytest.mark.parametrize("view", [View(), View(area=(0.9, 1.0)), View(area=(0.3, 0.5), ratio=(0.5, 0.6))])
def test_crops_are_those_of_random_resized_crop(view):
    random = np.random.default_rng(0)
    sizes, u = random.integers(10, 600, (2000, 2)), random.uniform(size=(32, 2000))
    expected = [reference_crop(view, u[:, i], *sizes[i].tolist()) for i in range(2000)]
    assert crop_boxes(view, u, sizes).tolist() == expected


@pytest.mark.parametrize(("ratio", "size"), [((3.0, 4.0), (9, 1)), ((0.2, 0.3), (1, 9))])
def test_crops_of_images_of_one_row_or_column_are_not_empty(ratio, size):
    boxes = draw((View(ratio=ratio),), np.arange(50), np.full((50, 2), size), seed=0)[0].box
    assert (boxes[:, 2:] == 1).all() and (boxes[:, :2] >= 0).all() and (boxes[:, :2] < size).all()


def test_the_evaluation_crop_is_the_centred_square():
    boxes = draw(evaluation(224), np.arange(2), np.array([[256, 341], [500, 400]]), seed=0)[0].box
    assert boxes.tolist() == [[16, 58, 224, 224], [75, 25, 350, 350]]


COUNT = 40_000


def near(values, mean, variance):
    """Whether the mean of independent values is within five standard errors of the expectation."""
    return abs(np.mean(values) - mean) < 5 * math.sqrt(variance / len(values))


def test_crops_have_the_documented_distribution():
    view, side = View(area=(0.08, 0.5)), 10_000  # so that the first attempt always fits and rounding is small
    top, left, height, width = draw((view,), np.arange(COUNT), np.full((COUNT, 2), side), seed=0)[0].box.T.astype(float)
    area, log_ratio, span = height * width / side**2, np.log(width / height), math.log(4 / 3)
    assert near(area, 0.29, 0.42**2 / 12) and near(area**2, (0.5**3 - 0.08**3) / 3 / 0.42, 0.01)
    assert near(log_ratio, 0, span**2 / 3) and near(log_ratio**2, span**2 / 3, span**4)
    for place, size in ((top, height), (left, width)):
        assert near(place / (side - size), 0.5, 1 / 12) and near((place / (side - size)) ** 2, 1 / 3, 4 / 45)
    assert abs(np.corrcoef(area, log_ratio)[0, 1]) < 5 / math.sqrt(COUNT)


def test_probabilities_and_strengths_are_those_of_the_recipe():
    first, second = draw(byol(2), np.arange(COUNT), np.full((COUNT, 2), 256), seed=3)
    assert near(first.flip, 0.5, 0.25) and near(second.solarize, 0.2, 0.16) and near(second.sigma > 0, 0.1, 0.09)
    assert not first.solarize.any() and (first.sigma > 0).all()
    assert first.sigma.min() >= 0.1 and first.sigma.max() <= 2 and near(first.sigma, 1.05, 1.9**2 / 12)
    assert (first.radius == np.ceil(3 * first.sigma)).all()

    identity = (first.colour == np.eye(3, 4, dtype=np.float32)).all(axis=(1, 2))
    assert near(identity, 0.2 * 0.8, 0.16 * 0.84)  # neither jitter nor grayscale
    rows_alike = np.abs(first.colour[:, 0] - first.colour[:, 1]).max(axis=1) < 1e-6
    assert near(rows_alike, 0.2, 0.16)  # grayscale
    # grey v becomes b c v + 128 (1 - c)
    contrast = 1 - first.colour[:, 0, 3] / 128
    brightness = first.colour[:, 0, :3].sum(axis=1) / contrast
    for factor in (contrast, brightness):
        assert near(factor, 1, 0.8 * 0.8**2 / 12) and factor.min() > 0.6 - 1e-5 and factor.max() < 1.4 + 1e-5
        assert near(np.abs(factor - 1) < 1e-6, 0.2, 0.16)
    assert abs(np.corrcoef(contrast[~identity], brightness[~identity])[0, 1]) < 0.03


def test_colour_matrices_keep_grey_grey_and_the_luma_of_saturation_and_hue():
    view = View(brightness=0.0, contrast=0.0, saturation=0.9, hue=0.5, jitter=1.0)
    linear = draw((view,), np.arange(100), np.full((100, 2), 64), seed=0)[0].colour[:, :, :3]
    assert np.abs(linear @ np.ones(3) - 1).max() < 1e-5
    assert np.abs(LUMA @ linear - LUMA).max() < 1e-5


def test_blur_windows_fit_into_small_views():
    assert draw((View(size=4),), np.arange(500), np.full((500, 2), 64), seed=0)[0].radius.max() == 3


def test_recipes_by_name():
    assert load_recipe("byol", 4, 96) == byol(4, 96) == (*byol(2, 96), *byol(2, 96))
    assert load_recipe("auto", 2, 32) == cifar(2, 32) and load_recipe("auto", 2, 96) == byol(2, 96)
    crops = load_recipe("multi_crop", 8, 224)
    assert [view.size for view in crops] == [224] * 2 + [96] * 6
    assert [view.area for view in crops] == [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 6
    assert [view.size for view in load_recipe("multi_crop", 3, 1)] == [1, 1, 1]
    assert [view.centre for view in (*evaluation(95), *evaluation(96))] == [1.0, 0.875]
    assert size_groups(multi_crop(2, 3)) == [[0, 1], [2, 3, 4]]
    assert size_groups((View(size=8), View(size=4), View(size=8))) == [[0, 2], [1]]


def test_recipes_from_a_file(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("- &first\n  blur: 5e-1\n  area: [2e-1, 1]\n- size: 1.6e1\n  interpolation: linear\n")
    first, second = View(size=32, blur=0.5, area=(0.2, 1)), View(size=16, interpolation="linear")
    assert load_recipe(str(path), 3, 32) == (first, second, first)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe("~/mine.yaml", 3, 32) == (first, second, first)


def test_a_block_of_a_recipe_may_be_another_with_changes(tmp_path):
    (tmp_path / "mine.yaml").write_text("- &first {blur: 0.5, flip: 0}\n- <<: *first\n  blur: 0\n")
    first, second = load_recipe(str(tmp_path / "mine.yaml"), 2, 32)
    assert (first, second) == (View(size=32, blur=0.5, flip=0), View(size=32, blur=0, flip=0))


def test_no_block_of_a_recipe_is_left_out(tmp_path):
    """As of eight crops, where --data.views has its default."""
    (tmp_path / "crops.yaml").write_text("- size: 32\n- size: 32\n" + 3 * "- size: 16\n")
    with pytest.raises(MSBRegError, match=r"has 5 blocks, of which --data.views 2 would leave out 3: set --data.views"):
        load_recipe(str(tmp_path / "crops.yaml"), 2, 32)
    assert len(load_recipe(str(tmp_path / "crops.yaml"), 5, 32)) == 5


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- blurr: 1", "block 1: no field is called blurr; there are size, area"),
        ("- size: 32\n- blur: 2", "block 2: blur is a probability, 0 to 1, not 2"),
        ("- area: [0.5, 0.2]", "area is a range"),
        ("- area: 0.5", "block 1: area is a range .*, not 0.5"),
        ("- area: [0.1]", "block 1: area is a range .*, not .0.1"),
        ("- sigma: [0, 2]", "block 1: sigma is a range .* 0 < low <= high .*, not .0, 2"),
        ("- sigma: {low: 1, high: 2}", "block 1: sigma is a range"),
        ("- jitter: 8e1", "block 1: jitter is a probability, 0 to 1, not 80"),
        ("- hue: null", "block 1: hue is a strength, 0 to 0.5, not None"),
        ("- centre: half", "block 1: centre is a share .*, not 'half'"),
        ("- centre: 0", "block 1: centre is a share .*, not 0"),
        ("- size: true", "block 1: size is a number of pixels"),
        ("- size: big", "size is a number of pixels"),
        ("- flip: often", "block 1: flip is a probability"),
        ("- flip: true", "block 1: flip is a probability, 0 to 1, not True"),
        ("- brightness: .inf", "brightness is a strength, 0 to 1000, not inf"),
        ("- sigma: [0.1, .inf]", "sigma is a range .* <= 1000, not"),
        ("- ratio: [0.5, .nan]", "ratio is a range"),
        ("blur: 1", "should be a list of blocks"),
        ("- just a word", "expected field: value pairs"),
        ("", "should be a list of blocks"),
        ("- [", "is not YAML"),
        ("- !!map blur", "is not YAML"),
        ("- flip: 0.5\n  blur: 0\n  flip: 0", "wrong.yaml has flip twice, again in line 3; leave one of them out"),
    ],
)
def test_wrong_recipe_files(tmp_path, text, says):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(MSBRegError, match=says):
        load_recipe(str(tmp_path / "wrong.yaml"), 2, 32)


@pytest.mark.parametrize("wrong", [{"area": 0.5}, {"ratio": None}, {"flip": "0.5"}, {"sigma": (0.1, 1, 2)}])
def test_a_view_of_wrong_types_is_a_value_error(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is a "):
        View(**wrong)


def test_ctrl_c_while_dali_is_imported_is_no_missing_dali(pictures, monkeypatch):
    def interrupted(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("initialization failed") from None  # whose context it still is

    monkeypatch.setattr("msbreg.data.dali_backend.DaliBackend.__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ViewLoader(pictures, byol(2, 16), 2, backend="auto")


def test_missing_recipes_and_views():
    with pytest.raises(MSBRegError, match="no recipe is called moco"):
        load_recipe("moco", 2, 32)
    with pytest.raises(MSBRegError, match="cannot be read: No such file"):
        load_recipe("missing.yaml", 2, 32)
    with pytest.raises(MSBRegError, match=r"at least one small one, not 2 in all: set --data\.views to 3 or more\.$"):
        load_recipe("multi_crop", 2, 224)
    for views in (lambda: byol(0), lambda: cifar(0), lambda: multi_crop(2, 0), lambda: multi_crop(0, 2)):
        with pytest.raises(ValueError, match="expected 1 view or more, got 0"):
            views()
