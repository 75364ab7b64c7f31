"""The graph: pixels against Pillow and torchvision, and the placement of its GPU form."""

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from image_files import encode, open_image, picture, val_loader, write_split
from nvidia.dali import fn
from PIL import Image
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    PILToTensor,
    Resize,
    functional,
)
from torchvision.transforms.autoaugment import _apply_op

from resnet_dist.config import AugmentConfig, DataConfig
from resnet_dist.data import operations
from resnet_dist.data.pixels.dali import (
    Augmenter,
    Decoder,
    GraphSpec,
    LoadedJob,
    Portion,
    build_pipeline,
    interpolation_numbers,
    windows_to_torch,
)
from resnet_dist.data.pixels.finish import (
    EXACT_RESIZES,
    FAST_RESIZES,
    Normalizer,
    erase,
    erase_by_mask,
    resize_and_crop,
)
from resnet_dist.data.pixels.image_header import image_size
from resnet_dist.data.pixels.read import Encoded
from resnet_dist.data.sampling import augment, crops
from resnet_dist.data.sampling.jobs import val_job
from resnet_dist.data.types import Job, OperationPlan

SIZES = [
    (375, 500),
    (500, 375),
    (333, 501),
    (257, 256),
    (256, 256),
    (255, 700),
    (97, 640),
    (640, 97),
    (31, 33),
    (1, 1),
    (1, 40),
    (40, 1),
    (225, 224),
    (768, 513),
]


def rotated(image: Image.Image) -> Image.Exif:
    orientation = 0x0112
    exif = image.getexif()
    exif[orientation] = 6
    return exif


def all_forms(image: Image.Image) -> list[bytes]:
    """The image in all forms of JPEG and PNG."""
    return [
        encode(image),
        encode(image, subsampling=0, quality=95),
        encode(image, subsampling=1),
        encode(image, progressive=True),
        encode(image.convert("L")),
        encode(image.convert("CMYK")),
        encode(image, "PNG"),
        encode(image.convert("L"), "PNG"),
        encode(image.convert("P"), "PNG"),
        encode(image.convert("RGBA"), "PNG"),
        encode(image, exif=rotated(image)),
    ]


def photographs(count: int = 40) -> list[bytes]:
    """ImageNet photographs, where there are some beside the project; the tests do not need them."""
    path = Path(__file__).parents[2] / "shared" / "data" / "imagenet-sample-500.tar"
    if not path.exists():
        return []
    files = []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith(".JPEG") and len(files) < count:
                files.append(tar.extractfile(member).read())
    return files


def pil(data: bytes) -> Image.Image:
    return open_image(data).convert("RGB")


def decode(files: list[bytes], windows) -> list[np.ndarray]:
    """Windows of some files, through the decoder of the CPU form."""
    number = len(files)
    images = []
    for row, data in enumerate(files):
        height, width = image_size(data)
        images.append(Encoded(row, data, height, width))
    windows = np.array(windows)
    # Only the windows matter: the decoder neither resizes nor flips.
    geometry = crops.Geometry(
        windows,
        views=(),
        flips=np.zeros(number, np.int64),
        interpolations=np.full(number, "bilinear"),
    )
    loaded = LoadedJob(val_job(np.arange(number)), images, geometry)
    decoder = Decoder(local_batch_size=number, threads=2, device=torch.device("cpu"))
    decoder.submit(Portion(loaded, 0, number))
    _, [decoded] = decoder.collect()
    return [pixels.numpy().copy() for pixels in windows_to_torch(decoded)]


def test_decoded_windows_are_pillows_pixels():
    """Also for CMYK, grayscale, palette and alpha; EXIF rotation is not applied, as PIL does not
    apply it.
    """
    height = 61
    width = 94
    forms = all_forms(picture(height, width))
    files = forms * 4
    # The whole of each form first, then random windows.
    windows = [(0, 0, height, width)] * len(forms)
    rng = np.random.default_rng(0)
    while len(windows) < len(files):
        top = rng.integers(0, height - 1)
        left = rng.integers(0, width - 1)
        window_height = rng.integers(1, height + 1 - top)
        window_width = rng.integers(1, width + 1 - left)
        windows.append((top, left, window_height, window_width))

    decoded = decode(files, windows)
    for data, window, pixels in zip(files, windows, decoded, strict=True):
        top, left, window_height, window_width = window
        whole = np.asarray(pil(data))
        expected = whole[top : top + window_height, left : left + window_width]
        assert np.array_equal(pixels, expected)


def pictures_of_all_sizes() -> list[bytes]:
    """A JPEG of each size of SIZES, as (height, width)."""
    files = []
    for seed, (height, width) in enumerate(SIZES):
        image = picture(height, width, seed)
        files.append(encode(image))
    return files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("resize_size", "crop_size", "interpolation"),
    [
        (256, 224, "bilinear"),
        (232, 224, "bilinear"),
        (64, 64, "bilinear"),
        (48, 64, "bilinear"),
        (48, 64, "bicubic"),
        (20, 33, "bilinear"),
    ],
)
def test_evaluation_pixels_are_torchvisions(tmp_path, resize_size, crop_size, interpolation):
    """Through the whole loader, the very pixels of Resize + CenterCrop on PIL images; odd sizes,
    ratios and forms.

    A shorter side that is resized to less than the crop is padded with black, as torchvision does.
    """
    files = pictures_of_all_sizes()
    files += all_forms(picture(130, 201))
    if crop_size == 224:
        files += photographs()
    index = write_split(tmp_path, files, split="val")
    loader = val_loader(
        index,
        tmp_path,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        val_resize_size=resize_size,
        val_crop_size=crop_size,
        val_interpolation=interpolation,
        val_batch_size=10,
    )
    resize = Resize(resize_size, InterpolationMode(interpolation))
    reference = Compose([resize, CenterCrop(crop_size), PILToTensor()])
    rows = []
    for batch in loader:
        for row, image in zip(batch.indices.tolist(), batch.images, strict=True):
            rows.append(row)
            pixels = (image * 255).round().to(torch.uint8)
            expected = reference(pil(files[row]))
            assert torch.equal(pixels, expected), row
    loader.close()
    assert rows == list(range(len(files)))


@pytest.mark.parametrize(("interpolation", "levels"), [("bilinear", 1), ("bicubic", 2)])
def test_training_cut_is_pillows(interpolation, levels):
    """Window, resize and flip of the CPU path, within 1/255 of PIL's crop, resize and mirror, or
    2/255 with the bicubic filter.
    """
    rng = np.random.default_rng(1)
    source = picture(300, 400)
    pixels = torch.from_numpy(np.array(source))
    resize = FAST_RESIZES[interpolation]
    method = Image.Resampling[interpolation.upper()]
    for _ in range(60):
        top = int(rng.integers(0, 299))
        left = int(rng.integers(0, 399))
        height = int(rng.integers(1, 301 - top))
        width = int(rng.integers(1, 401 - left))
        bottom = top + height
        right = left + width
        flip = bool(rng.integers(2))
        own_window = pixels[top:bottom, left:right].contiguous()
        ours = resize_and_crop(own_window, (96, 96), (0, 0), flip, 96, resize)

        window = source.crop((left, top, right, bottom))
        rows_first = window.resize((96, height), method).resize((96, 96), method)
        references = [rows_first]
        if interpolation == "bilinear":
            # Pillow 13 begins with the columns of some windows. With the bicubic filter that can
            # make a difference of 21 (docs/data.md).
            references.append(window.resize((96, 96), method))
        for reference in references:
            if flip:
                reference = reference.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            difference = np.abs(ours.numpy().astype(int) - np.asarray(reference))
            assert difference.max() <= levels


def test_graph_that_finishes_has_the_same_geometry():
    """The second half of the GPU form, run on the CPU: within 1/255 of Pillow, so nothing is
    shifted.

    Except at the image's very edge, where DALI's filter repeats the last pixel and Pillow's leaves
    out what is missing: in evaluation the central crop takes that away.
    """
    files = pictures_of_all_sizes()
    heights, widths = np.array([image_size(data) for data in files]).T
    pipeline = build_pipeline(GraphSpec(len(files), 2, views=1))
    rows = np.arange(len(files))
    side = 64

    def differences_of(geometry):
        """|ours - DALI's| of each file, in levels."""
        squares_of_dali = run_finishing_graph(pipeline, files, geometry)
        our_squares = finish_with_torch(files, geometry)
        for ours, of_dali in zip(our_squares, squares_of_dali, strict=True):
            yield np.abs(ours.astype(int) - of_dali)

    def assert_near(geometry, edge):
        """But for a frame of `edge` pixels, at most one level apart."""
        for size, difference in zip(SIZES, differences_of(geometry), strict=True):
            assert difference.mean() < 0.3, size
            inner = difference[edge : side - edge, edge : side - edge]
            assert inner.max() <= 1, size

    val_config = DataConfig(val_resize_size=72, val_crop_size=side)
    assert_near(crops.val_geometry(heights, widths, val_config), edge=0)
    train_config = DataConfig()
    geometry = crops.train_geometry(0, 0, rows, heights, widths, side, train_config)
    assert_near(geometry, edge=2)
    random_filter = DataConfig(train_interpolation="random")
    geometry = crops.train_geometry(0, 0, rows, heights, widths, side, random_filter)
    assert_near(geometry, edge=4)

    # The image's edges are inside of the square here: only the mean is compared.
    padded_config = DataConfig(val_resize_size=50, val_crop_size=side)
    geometry = crops.val_geometry(heights, widths, padded_config)
    for size, difference in zip(SIZES, differences_of(geometry), strict=True):
        assert difference.mean() < 0.3, size


def finish_with_torch(files, geometry) -> list[np.ndarray]:
    """The squares that the CPU path cuts out of the files: uint8 [side, side, 3] each."""
    [view] = geometry.views
    squares_of_files = []
    for row, pixels in enumerate(decode(files, geometry.windows)):
        square = resize_and_crop(
            torch.from_numpy(pixels),
            tuple(view.sizes[row].tolist()),
            view.offsets[row].tolist(),
            geometry.flips[row],
            view.side,
            EXACT_RESIZES[geometry.interpolations[row]],
        )
        squares_of_files.append(square.numpy())
    return squares_of_files


def run_finishing_graph(pipeline, files, geometry):
    """The squares that DALI cuts out of the files: uint8 [n, side, side, 3]."""
    [view] = geometry.views
    windows = geometry.windows.astype(np.int32)
    inputs = {
        "encoded": [np.frombuffer(data, np.uint8) for data in files],
        "anchor": windows[:, :2].copy(),
        "extent": windows[:, 2:].copy(),
        "size0": view.sizes.astype(np.float32),
        "offset0": view.offsets.astype(np.int32),
        "square0": np.full((len(files), 2), view.side, np.int32),
        "flip": geometry.flips.astype(np.int32),
        "interpolation": interpolation_numbers(geometry.interpolations),
    }
    for name, values in inputs.items():
        pipeline.feed_input(name, values)
    pipeline.schedule_run()
    [output] = pipeline.share_outputs()
    finished = np.array(output.as_tensor())
    pipeline.release_outputs()
    return finished


def protobuf_fields(data: bytes):
    """(number, value) of each field of a protocol buffer message; enough of the format to read a
    graph without DALI.
    """
    varint = 0
    fixed_lengths = {1: 8, 5: 4}
    position = 0

    def read_varint():
        nonlocal position
        value = 0
        shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            is_last = byte < 128
            if is_last:
                return value

    while position < len(data):
        key = read_varint()
        number = key >> 3
        wire_type = key & 7
        if wire_type == varint:
            yield number, read_varint()
            continue
        length = fixed_lengths.get(wire_type)
        if length is None:
            length = read_varint()
        yield number, data[position : position + length]
        position += length


# Numbers of fields in DALI's messages: the operators of a graph; the name, the inputs and the
# arguments of an operator; the name of an argument, and its value if it is a text.
OPERATOR = 5
NAME = 1
INPUT = 2
ARGUMENT = 4
TEXT = 5


def operators_of(pipeline) -> list[list]:
    """The fields of each operator of a graph."""
    operators = []
    for number, value in protobuf_fields(pipeline.serialize()):
        if number == OPERATOR:
            fields = list(protobuf_fields(value))
            operators.append(fields)
    return operators


def messages(fields, wanted: int) -> list[dict]:
    """The fields with this number, as messages."""
    found = []
    for number, value in fields:
        if number == wanted:
            message = dict(protobuf_fields(value))
            found.append(message)
    return found


def name_of_operator(fields) -> str:
    return dict(fields)[NAME].decode()


def device_of_operator(fields) -> str:
    arguments = messages(fields, ARGUMENT)
    [device] = [argument for argument in arguments if argument.get(NAME) == b"device"]
    return device[TEXT].decode()


def placement(pipeline) -> dict[str, set]:
    """The devices of each kind of operator in a graph."""
    devices = {}
    for fields in operators_of(pipeline):
        name = name_of_operator(fields)
        devices.setdefault(name, set())
        devices[name].add(device_of_operator(fields))
    return devices


@pytest.mark.slow
@pytest.mark.parametrize("slots", [0, 1])
def test_gpu_form_places_what_touches_pixels_on_the_gpu(slots):
    """Defined and serialized without a GPU: DALI checks operators, arguments and devices on the
    way.
    """
    pipeline = build_pipeline(GraphSpec(8, 4, "mixed", views=1, slots=slots))
    operators = placement(pipeline)
    assert operators.pop("ExternalSource") == {"cpu"}
    # The filter of each image is an argument of the resize.
    assert operators.pop("Reinterpret") == {"cpu"}
    assert operators.pop("decoders__Image") == {"mixed"}
    assert "decoders__ImageSlice" not in operators
    # On the CPU as well: which operation an image gets, and its arguments.
    of_slots = None
    if slots:
        of_slots = {"cpu", "gpu"}
    for name in ("_ArithmeticGenericOp", "_TensorSubscript", "_conditional__Split"):
        assert operators.pop(name, None) == of_slots

    expected = {"Resize", "Slice", "Flip"}
    if slots:
        expected |= {"WarpAffine", "Equalize", "Filter", "_conditional__Merge"}
    assert expected <= operators.keys()
    for name, devices in operators.items():
        assert devices == {"gpu"}, name


def test_gpu_form_resizes_with_antialias_and_the_filter_of_each_image():
    pipeline = build_pipeline(GraphSpec(8, 4, "mixed", views=1))
    operators = operators_of(pipeline)
    [resize] = [fields for fields in operators if name_of_operator(fields) == "Resize"]
    argument_names = [argument[NAME] for argument in messages(resize, ARGUMENT)]
    assert b"antialias" in argument_names
    values_of_inputs = []
    for resize_input in messages(resize, INPUT):
        values_of_inputs += resize_input.values()
    assert b"interp_type" in values_of_inputs


def test_cpu_form_ends_after_the_window():
    pipeline = build_pipeline(GraphSpec(8, 4))
    assert b"Resize" not in pipeline.serialize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [5, 224])
def test_normalizer_subtracts_the_mean_and_divides_by_the_deviation(dtype, width):
    config = DataConfig()
    pixels = torch.randint(0, 256, (3, 37, width, 3), dtype=torch.uint8)
    out = torch.empty(pixels.shape, dtype=dtype)
    normalize = Normalizer(config, dtype, torch.device("cpu"))
    normalize.prepare(width)
    normalize(pixels, out)
    mean = torch.tensor(config.mean)
    std = torch.tensor(config.std)
    expected = (pixels.double() / 255 - mean) / std
    tolerance = 3 * torch.finfo(dtype).eps
    if dtype == torch.float32:
        tolerance = 1e-6
    difference = (out.double() - expected).abs()
    assert difference.max() <= tolerance


def test_the_gpu_erases_what_the_cpu_erases():
    """The form for the whole batch, on rectangles at every edge, of one pixel, and none."""
    rectangles = (
        (0, 0, 3, 4),
        (7, 0, 3, 12),
        (0, 9, 10, 3),
        (4, 5, 1, 1),
        (0, 0, 10, 12),
        (0, 0, 0, 0),
    )
    boxes = np.array(rectangles, np.int64)
    images = torch.randn(len(boxes), 10, 12, 3)
    on_cpu = images.clone()
    erase(on_cpu, boxes)
    on_gpu = images.clone()
    erase_by_mask(on_gpu, torch.from_numpy(boxes))
    assert torch.equal(on_gpu, on_cpu)
    zeros_of_images = (on_cpu == 0).sum((1, 2, 3))
    num_channels = 3
    erased_pixels = zeros_of_images // num_channels
    assert erased_pixels.tolist() == [12, 36, 30, 1, 120, 0]


# What policies and jitter reach at their ends, and the neutral parameters.
PARAMETERS = {
    "identity": [0],
    "shear_x": [-0.99, 0.1, 0.3],
    "shear_y": [-0.3, 0.99],
    "translate_x": [-31, 7],
    "translate_y": [9, -5],
    "rotate": [-135, 3.3, 30],
    "brightness": [0.1, 1, 1.99],
    "color": [0.01, 0.7, 1, 1.99],
    "contrast": [0.01, 0.7, 1, 1.99],
    "sharpness": [0.01, 1, 1.3, 1.99],
    "posterize": [2, 4, 8],
    "solarize": [0, 100.5, 255],
    "autocontrast": [0],
    "equalize": [0],
    "invert": [0],
    "hue": [-0.5, -0.1, 0.05, 0.3],
}
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


class Applied(NamedTuple):
    """An operation and its parameter."""

    name: str
    value: float


def plan_of(cases: Sequence[Applied], side: int) -> OperationPlan:
    """One operation for each image of a batch."""
    numbers = [operations.NAMES.index(case.name) for case in cases]
    values = [case.value for case in cases]
    # [B, 1]
    ops = np.array(numbers, np.int32)[:, None]
    params = np.array(values, np.float32)[:, None]
    return OperationPlan(ops, params, operations.matrices(ops, params, side))


def torchvisions(image: torch.Tensor, name: str, value: float) -> torch.Tensor:
    """The operation of the same name: tensors' for geometry and hue, which has 256 values in
    Pillow; else Pillow's.
    """
    channels_first = image.permute(2, 0, 1)
    if name == "hue":
        result = functional.adjust_hue(channels_first, value)
        return result.permute(1, 2, 0)
    # "ShearX" for shear_x.
    title = name.title().replace("_", "")
    if name == "autocontrast":
        title = "AutoContrast"
    if name in GEOMETRIC:
        result = _apply_op(channels_first, title, value, InterpolationMode.BILINEAR, None)
        return result.permute(1, 2, 0)
    if name in ("brightness", "color", "contrast", "sharpness"):
        # torchvision's magnitude is the change of the factor.
        value = value - 1
    result = _apply_op(Image.fromarray(image.numpy()), title, value, None, None)
    return torch.from_numpy(np.array(result))


def difference_of(found, expected) -> torch.Tensor:
    """Of uint8 images, in levels."""
    return (found.int() - expected.int()).abs()


class TimmCase(NamedTuple):
    """An operation, and the same in timm for a picture of 224 pixels."""

    ours: Applied
    function: str
    argument: float


TIMM_CASES = [
    TimmCase(Applied("timm_shear_x", 0.21), "shear_x", 0.21),
    TimmCase(Applied("timm_shear_y", -0.3), "shear_y", -0.3),
    TimmCase(Applied("timm_translate_x", -40.5), "translate_x_abs", 40.5),
    TimmCase(Applied("timm_translate_y", 90.0), "translate_y_abs", -90.0),
    TimmCase(Applied("timm_rotate", 21.0), "rotate", 21.0),
    TimmCase(Applied("timm_posterize", 2), "posterize", 2),
    TimmCase(Applied("timm_posterize", 1), "posterize", 1),
    TimmCase(Applied("timm_solarize", 77), "solarize", 77),
    TimmCase(Applied("timm_solarize", 0), "solarize", 0),
    TimmCase(Applied("solarize_add", 77), "solarize_add", 77),
    TimmCase(Applied("solarize_add", 110), "solarize_add", 110),
]


def timms(image: torch.Tensor, case: TimmCase) -> torch.Tensor:
    """The operation of a case by timm, bilinear and with the mean colour outside."""
    from timm.data import auto_augment

    operation = getattr(auto_augment, case.function)
    result = operation(
        Image.fromarray(image.numpy()),
        case.argument,
        resample=Image.Resampling.BILINEAR,
        fillcolor=(124, 116, 104),
    )
    return torch.from_numpy(np.array(result))


@pytest.mark.slow
def test_operations_are_timms():
    """With bilinear interpolation and the mean colour outside; the geometric ones but for edges."""
    side = 224
    num_cases = len(TIMM_CASES)
    augmenter = Augmenter(slots=1, local_batch_size=num_cases, threads=1)
    plan = plan_of([case.ours for case in TIMM_CASES], side)
    for image in squares(3, side):
        copies = image.expand(num_cases, -1, -1, -1).contiguous()
        found = augmenter(copies, plan)
        for case, pixels in zip(TIMM_CASES, found, strict=True):
            difference = difference_of(pixels, timms(image, case))
            kind = case.ours.name.removeprefix("timm_")
            if kind in GEOMETRIC:
                share_of_edges = (difference > 2).float().mean()
                assert share_of_edges < 0.02, case
                assert difference.float().mean() < 0.8, case
            else:
                assert difference.max() == 0, case


def squares(count: int, side: int) -> torch.Tensor:
    """Pictures, one of them with a channel of one value and one of a single colour."""
    pictures = [pil(data) for data in photographs(count // 2)]
    num_drawn = count - len(pictures)
    pictures += [picture(side, side, seed) for seed in range(num_drawn)]
    resized = [np.asarray(image.resize((side, side))) for image in pictures]
    images = torch.from_numpy(np.stack(resized))
    images[0, ..., 1] = 77
    images[1] = torch.tensor([200, 10, 90], dtype=torch.uint8)
    return images


@pytest.mark.slow
@pytest.mark.parametrize("gpu_form", [False, True])
def test_operations_are_torchvisions(gpu_form, monkeypatch):
    """Within 1 level, 2 for color, contrast and equalize, at every pixel; the outermost of
    sharpness excepted.

    All cases are in one batch. The GPU form warps with another operator, which has a CPU form, too.
    """
    cases = []
    for name, values in PARAMETERS.items():
        if gpu_form and name not in GEOMETRIC:
            continue
        cases += [Applied(name, value) for value in values]
    if gpu_form:
        monkeypatch.setattr(fn.experimental, "warp_perspective", warp_affine)
    # Pillow's equalize divides by a whole number, (pixels - brightest) // 255: of small pictures it
    # is another law.
    side = 224
    augmenter = Augmenter(slots=1, local_batch_size=len(cases), threads=1)
    plan = plan_of(cases, side)
    for image in squares(3, side):
        copies = image.expand(len(cases), -1, -1, -1).contiguous()
        found = augmenter(copies, plan)
        for case, pixels in zip(cases, found, strict=True):
            expected = torchvisions(image, case.name, case.value)
            difference = difference_of(pixels, expected)
            if case.name == "sharpness":
                difference = difference[1:-1, 1:-1]
            assert difference.max() <= largest_difference(case.name, case.value), case
            assert difference.float().mean() < 0.8, case


def warp_affine(pixels, matrix, fill_value):
    """The operator of the GPU form, in the place of that of the CPU form."""
    return fn.warp_affine(pixels, matrix=matrix[:2], fill_value=0.0)


def largest_difference(name, value):
    """How far an operation may be from torchvision's, in levels."""
    exact = ("identity", "translate_x", "translate_y", "posterize", "solarize", "invert")
    if name in exact or value == 1:
        return 0
    if name in ("color", "contrast", "equalize"):
        return 2
    return 1


@pytest.mark.slow
def test_augmentation_does_not_depend_on_the_batch():
    """Nor on threads, on what came before, on an error in between; a graph serves every side and
    batch size.
    """
    config = AugmentConfig(policy="trivialaugment", color_jitter=(0, 0.4, 0, 0.1))
    slots = augment.num_slots(config)
    with_one_thread = Augmenter(slots=slots, local_batch_size=12, threads=1)
    with_three_threads = Augmenter(slots=slots, local_batch_size=12, threads=3)
    for side, count in ((48, 12), (80, 5)):
        images = squares(count, side)
        plan = augment.plan_operations(config, 0, 0, np.arange(count), side)
        before = images.clone()
        together = with_one_thread(images, plan)
        assert torch.equal(images, before)
        assert not torch.equal(together, images)
        assert torch.equal(with_three_threads(images, plan), together)

        for row in (0, 3):
            plan_of_row = augment.plan_operations(config, 0, 0, np.array([row]), side)
            alone = with_one_thread(images[row : row + 1], plan_of_row)
            assert torch.equal(alone[0], together[row])

        if side == 48:
            # More operations than images.
            with pytest.raises(RuntimeError):
                with_one_thread(images[:2], plan)


@pytest.mark.slow
def test_slots_in_the_graph_of_the_decoder_come_after_the_flip():
    """The GPU graph's form, run on the CPU: what the second stage makes of the same squares."""
    config = AugmentConfig(policy="autoaugment", color_jitter=(0, 0, 0.4, 0))
    slots = augment.num_slots(config)
    side = 64
    rows = np.arange(8)
    heights = np.full(8, 100)
    widths = np.full(8, 120)
    geometry = crops.train_geometry(0, 0, rows, heights, widths, side, DataConfig())
    plan = augment.plan_operations(config, 0, 0, rows, side)
    images = []
    for row in range(8):
        data = encode(picture(100, 120, seed=row))
        images.append(Encoded(row, data, 100, 120))
    job = Job(rows, training=True, operations=plan)
    loaded = LoadedJob(job, images, geometry)

    def squares_of_graph(num_slots):
        decoder = Decoder(local_batch_size=8, threads=2, device=torch.device("cpu"))
        decoder.spec = GraphSpec(8, 2, views=1, slots=num_slots)
        decoder.restart()
        decoder.submit(Portion(loaded, 0, 8))
        _, [decoded] = decoder.collect()
        return torch.stack(windows_to_torch(decoded))

    without_slots = squares_of_graph(0)
    with_slots = squares_of_graph(slots)
    augmenter = Augmenter(slots=slots, local_batch_size=8, threads=1)
    assert torch.equal(augmenter(without_slots, plan), with_slots)
    assert not torch.equal(without_slots, with_slots)
