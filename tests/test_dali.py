"""The graph: pixels against Pillow and torchvision, and the placement of its GPU form."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encode, picture, val_loader, write_split
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from resnet_dist.config import DataConfig
from resnet_dist.data import crops
from resnet_dist.data.dali import Decoder, Job, build_pipeline, windows_to_torch
from resnet_dist.data.finish import Normalizer, cut, resize_exact
from resnet_dist.data.read import Encoded, image_size

SIZES = [(375, 500), (500, 375), (333, 501), (257, 256), (256, 256), (255, 700), (97, 640), (640, 97), (31, 33), (1, 1),
         (1, 40), (40, 1), (225, 224), (768, 513)]
FORMS = {
    "rgb": lambda image: encode(image),
    "444": lambda image: encode(image, subsampling=0, quality=95),
    "422": lambda image: encode(image, subsampling=1),
    "progressive": lambda image: encode(image, progressive=True),
    "gray": lambda image: encode(image.convert("L")),
    "cmyk": lambda image: encode(image.convert("CMYK")),
    "png": lambda image: encode(image, "PNG"),
    "png gray": lambda image: encode(image.convert("L"), "PNG"),
    "png palette": lambda image: encode(image.convert("P"), "PNG"),
    "png alpha": lambda image: encode(image.convert("RGBA"), "PNG"),
    "rotated": lambda image: encode(image, exif=rotated(image)),
}
PHOTOGRAPHS = sorted((Path(__file__).parents[2] / "shared" / "data").glob("**/*.JPEG"))[:40]


def rotated(image: Image.Image) -> Image.Exif:
    exif = image.getexif()
    exif[0x0112] = 6
    return exif


def pil(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def decode(files: list[bytes], windows) -> list[np.ndarray]:
    """Windows of some files, through the decoder of the CPU form."""
    images = [Encoded(row, data, *image_size(data)) for row, data in enumerate(files)]
    windows = np.array(windows)
    job = Job(np.arange(len(files)), images=images, geometry=crops.Geometry(windows, (), windows[:, 0]))
    decoder = Decoder(local_batch_size=len(files), threads=2, device=torch.device("cpu"))
    decoder.submit(job)
    return [pixels.numpy().copy() for pixels in windows_to_torch(decoder.collect()[1][0])]


def test_decoded_windows_are_pillows_pixels():
    """Also for CMYK, grayscale, palette and alpha; EXIF rotation is not applied, as PIL does not apply it."""
    rng = np.random.default_rng(0)
    files = [form(picture(61, 94, seed)) for seed, form in enumerate(FORMS.values())] * 4
    corners = [(rng.integers(0, 60), rng.integers(0, 93)) for _ in files]
    windows = [(y, x, rng.integers(1, 62 - y), rng.integers(1, 95 - x)) for y, x in corners]
    windows[:len(FORMS)] = [(0, 0, 61, 94)] * len(FORMS)
    for data, (y, x, h, w), pixels in zip(files, windows, decode(files, windows), strict=True):
        assert np.array_equal(pixels, np.asarray(pil(data))[y:y + h, x:x + w])


@pytest.mark.parametrize(("resize_size", "crop_size"), [(256, 224), (232, 224), (64, 64), (48, 64), (20, 33)])
def test_evaluation_pixels_are_torchvisions(tmp_path, resize_size, crop_size):
    """Through the whole loader, the very pixels of Resize + CenterCrop on PIL images; odd sizes, ratios and forms.

    A shorter side that is resized to less than the crop is padded with black, as torchvision does.
    """
    files = [encode(picture(*size, seed)) for seed, size in enumerate(SIZES)]
    files += [form(picture(130, 201)) for form in FORMS.values()]
    if crop_size == 224:
        files += [path.read_bytes() for path in PHOTOGRAPHS]
    index = write_split(tmp_path, files, split="val")
    loader = val_loader(index, tmp_path, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), val_resize_size=resize_size,
                        val_crop_size=crop_size, val_batch_size=10)
    reference = Compose([Resize(resize_size), CenterCrop(crop_size), PILToTensor()])
    shown = [(int(row), image) for batch in loader for row, image in zip(batch.indices, batch.images, strict=True)]
    assert [row for row, _ in shown] == list(range(len(files)))
    for row, image in shown:
        assert torch.equal((image * 255).round().to(torch.uint8), reference(pil(files[row]))), row
    loader.close()


def test_training_cut_is_pillows():
    """Window, resize and flip of the CPU path, within 1/255 of PIL's crop, resize and mirror."""
    rng = np.random.default_rng(1)
    source = picture(300, 400)
    pixels = torch.from_numpy(np.array(source))
    for _ in range(60):
        y, x = int(rng.integers(0, 299)), int(rng.integers(0, 399))
        h, w, flip = int(rng.integers(1, 301 - y)), int(rng.integers(1, 401 - x)), bool(rng.integers(2))
        ours = cut(pixels[y:y + h, x:x + w].contiguous(), (96, 96), (0, 0), flip, 96)
        theirs = source.crop((x, y, x + w, y + h)).resize((96, 96), Image.Resampling.BILINEAR)
        theirs = np.asarray(theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else theirs)
        assert np.abs(ours.numpy().astype(int) - theirs).max() <= 1


def test_graph_that_finishes_has_the_same_geometry():
    """The second half of the GPU form, run on the CPU: within 1/255 of Pillow, so nothing is shifted.

    Except at the image's very edge, where DALI's filter repeats the last pixel and Pillow's leaves out what is missing:
    in evaluation the central crop takes that away.
    """
    files = [encode(picture(*size, seed)) for seed, size in enumerate(SIZES)]
    heights, widths = np.array([image_size(data) for data in files]).T
    pipeline = build_pipeline(local_batch_size=len(files), threads=2, device_id=None, decode="cpu", views=1)
    rows = np.arange(len(files))
    geometries = [
        (0, crops.val_geometry(heights, widths, DataConfig(val_resize_size=72, val_crop_size=64))),
        (None, crops.val_geometry(heights, widths, DataConfig(val_resize_size=50, val_crop_size=64))),
        (2, crops.train_geometry(0, 0, rows, heights, widths, 64, DataConfig())),
    ]
    for inner, geometry in geometries:
        windows, flips, (view,) = geometry.windows, geometry.flips, geometry.views
        sizes, offsets = view.sizes, view.offsets
        pipeline.feed_input("encoded", [np.frombuffer(data, np.uint8) for data in files])
        pipeline.feed_input("anchor", windows[:, :2].astype(np.int32).copy())
        pipeline.feed_input("extent", windows[:, 2:].astype(np.int32).copy())
        pipeline.feed_input("size0", sizes.astype(np.float32))
        pipeline.feed_input("offset0", offsets.astype(np.int32))
        pipeline.feed_input("square0", np.full((len(files), 2), 64, np.int32))
        pipeline.feed_input("flip", flips.astype(np.int32))
        pipeline.schedule_run()
        finished = np.asarray(pipeline.share_outputs()[0].as_tensor())
        pipeline.release_outputs()
        for row, pixels in enumerate(decode(files, windows)):
            pixels = torch.from_numpy(pixels)
            ours = cut(pixels, tuple(sizes[row].tolist()), offsets[row].tolist(), flips[row], 64, resize_exact).numpy()
            difference = np.abs(ours.astype(int) - finished[row])
            assert difference.mean() < 0.3, SIZES[row]
            assert inner is None or difference[inner:64 - inner, inner:64 - inner].max() <= 1, SIZES[row]


def protobuf_fields(data: bytes):
    """(number, value) of each field of a protocol buffer message; enough of the format to read a graph without DALI."""
    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    position = 0
    while position < len(data):
        key = varint()
        length = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        length = varint() if length is None else length
        yield key >> 3, data[position:position + length]
        position += length


def test_gpu_form_places_decode_and_resize_on_the_gpu():
    """Defined and serialized without a GPU: DALI checks operators, arguments and devices on the way."""
    pipeline = build_pipeline(local_batch_size=8, threads=4, device_id=None, decode="mixed", views=1)
    operators = {}
    for number, value in protobuf_fields(pipeline.serialize()):
        if number == 5:                                                      # an operator: name 1, arguments 4
            parts = list(protobuf_fields(value))
            arguments = [dict(protobuf_fields(part)) for key, part in parts if key == 4]
            operators[parts[0][1].decode()] = next(a[5].decode() for a in arguments if a.get(1) == b"device")
    assert operators.pop("ExternalSource") == "cpu"
    assert operators == {"decoders__ImageSlice": "mixed", "Resize": "gpu", "Slice": "gpu", "Flip": "gpu"}


def test_cpu_form_ends_after_the_window():
    pipeline = build_pipeline(local_batch_size=8, threads=4, device_id=None, decode="cpu", views=0)
    assert b"Resize" not in pipeline.serialize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 224])
def test_normalizer(dtype, width):
    config = DataConfig()
    pixels = torch.randint(0, 256, (3, 37, width, 3), dtype=torch.uint8)
    out = torch.empty(pixels.shape, dtype=dtype)
    normalize = Normalizer(config, dtype, torch.device("cpu"))
    normalize.prepare(width)
    normalize(pixels, out)
    expected = (pixels.double() / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    assert (out.double() - expected).abs().max() <= {torch.float32: 1e-6}.get(dtype, 3 * torch.finfo(dtype).eps)
