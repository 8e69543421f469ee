"""Ways to run the pipeline faster, which must not change what it says: streams, dtypes, folding, compiling."""

import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionad_pipe import DiffusionADPipeline, SegmentationUNet2DModel, open_image
from diffusionad_pipe.runtime.acceleration import explained_out_of_memory, fastest_dtype
from diffusionad_pipe.runtime.prefetch import prefetched

ROOT = Path(__file__).parents[1]
HAZELNUT = ROOT / "training" / "data" / "hazelnut_toy" / "hazelnut"


def make_images(count: int, size: int = 32) -> list[Image.Image]:
    random = np.random.RandomState(0)
    return [Image.fromarray(random.randint(0, 256, (size, size + i, 3), dtype=np.uint8)) for i in range(count)]


def stream(pipe: DiffusionADPipeline, images: Iterable, overlapped: bool, **arguments: Any) -> Iterator:
    """`pipe.stream` as it is on a CPU, or as on a GPU, where the stages overlap too."""
    if not overlapped:
        return pipe.stream(images, **arguments)
    return pipe._stream(images, pipe._resolve(**arguments), None, False, True)


OVERLAPPED = pytest.mark.parametrize("overlapped", [False, True])


@OVERLAPPED
def test_a_stream_is_the_call(overlapped: bool, tiny_pipeline: DiffusionADPipeline) -> None:
    tiny_pipeline.register_to_config(image_threshold=0.5, pixel_threshold=0.5)
    images = make_images(5)
    called = tiny_pipeline(images, batch_size=2, output_type="np", guidance_scale=0.5, height=64)
    settings = {"batch_size": 2, "output_type": "np", "guidance_scale": 0.5, "height": 64}
    streamed = list(stream(tiny_pipeline, iter(images), overlapped, **settings))
    assert len(streamed) == 5
    for index, output in enumerate(streamed):
        for name in ("anomaly_maps", "anomaly_scores", "reconstructions", "predicted_masks", "is_anomalous"):
            np.testing.assert_array_equal(getattr(output, name)[0], getattr(called, name)[index], err_msg=name)
    assert [o.anomaly_maps[0].size for o in tiny_pipeline.stream(images)] == [(32 + i, 32) for i in range(5)]
    assert list(tiny_pipeline.stream([])) == []


@pytest.mark.parametrize("tiled", [False, True])
def test_networks_that_record_cuda_graphs_run_in_the_callers_thread(
    tiled: bool, tiny_pipeline: DiffusionADPipeline
) -> None:
    """Each thread has graphs of its own. No graph is recorded here, as that takes a GPU."""
    threads: list[threading.Thread] = []
    tiny_pipeline.unet.register_forward_hook(lambda *_: threads.append(threading.current_thread()))
    if tiled:
        tiny_pipeline.enable_tiling(32)
    expected = [output.anomaly_scores[0] for output in stream(tiny_pipeline, make_images(3), True, batch_size=1)]
    assert threading.current_thread() not in threads
    threads.clear()
    tiny_pipeline._records_cuda_graphs = True
    assert [
        output.anomaly_scores[0] for output in stream(tiny_pipeline, make_images(3), True, batch_size=1)
    ] == expected
    assert set(threads) == {threading.current_thread()}


def test_a_generator_draws_in_a_stream_as_in_a_call(tiny_pipeline: DiffusionADPipeline) -> None:
    images = make_images(3)
    called = tiny_pipeline(images, batch_size=2, generator=torch.Generator().manual_seed(5), output_type="np")
    outputs = tiny_pipeline.stream(images, batch_size=2, generator=torch.Generator().manual_seed(5), output_type="np")
    assert [output.anomaly_scores[0] for output in outputs] == called.anomaly_scores.tolist()


@OVERLAPPED
def test_a_stream_reads_ahead_but_not_far(overlapped: bool, tiny_pipeline: DiffusionADPipeline) -> None:
    read: list[threading.Thread] = []

    def endless() -> Iterator[Image.Image]:
        while True:
            read.append(threading.current_thread())
            yield make_images(1)[0]

    outputs = stream(tiny_pipeline, endless(), overlapped, batch_size=1)
    assert not read
    for _ in range(3):
        next(outputs)
    assert threading.current_thread() not in read
    time.sleep(1)
    count = len(read)
    assert 3 < count < 20
    outputs.close()
    for thread in set(read):
        thread.join(30)
        assert not thread.is_alive()
    assert len(read) <= count + 2


@OVERLAPPED
def test_an_error_in_a_stream_comes_after_the_good_outputs(
    overlapped: bool, tiny_pipeline: DiffusionADPipeline
) -> None:
    def some_break() -> Iterator[Image.Image]:
        yield from make_images(2)
        raise OSError("the camera was unplugged")

    outputs = stream(tiny_pipeline, some_break(), overlapped, batch_size=1)
    next(outputs), next(outputs)
    with pytest.raises(OSError, match="unplugged"):
        next(outputs)
    outputs = stream(tiny_pipeline, [*make_images(1), np.full((32, 32, 3), 7.0)], overlapped, batch_size=1)
    next(outputs)
    with pytest.raises(ValueError, match="divide 0..255"):
        next(outputs)


@pytest.mark.parametrize(
    "arguments, cause",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"noise": torch.zeros(2, 1, 3, 32, 32)}, "not known"),
        ({"generator": [torch.Generator()]}, "one generator for all"),
        ({"return_dict": False}, "leave return_dict out"),
    ],
)
def test_bad_arguments_of_a_stream(tiny_pipeline: DiffusionADPipeline, arguments: dict, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        tiny_pipeline.stream(make_images(1), **arguments)


def test_prefetched_keeps_order_and_errors() -> None:
    assert list(prefetched(range(100), ahead=1)) == list(range(100))
    assert list(prefetched(prefetched([1, 2, 3]))) == [1, 2, 3]
    assert list(prefetched([])) == []
    with pytest.raises(TypeError, match="not iterable"):
        list(prefetched(None))  # type: ignore[arg-type]


def test_fixed_noise_is_drawn_once(tiny_pipeline: DiffusionADPipeline) -> None:
    tiny_pipeline(make_images(1))
    drawn = tiny_pipeline.fixed_noise(1, 32, 32)
    tiny_pipeline(make_images(3))
    assert tiny_pipeline.fixed_noise(1, 32, 32) is drawn
    assert tiny_pipeline.fixed_noise(1, 32, 64).shape == (1, 2, 1, 3, 32, 64)
    tiny_pipeline.register_to_config(noise_seed=3)
    assert not torch.equal(tiny_pipeline.fixed_noise(1, 32, 32), drawn)


def test_outputs_can_be_used_for_training(tiny_pipeline: DiffusionADPipeline) -> None:
    """Tensors made in inference mode could not: autograd refuses them."""
    output = tiny_pipeline(make_images(1), output_type="pt")
    weight = torch.ones(1, requires_grad=True)
    (weight * output.anomaly_maps).sum().backward()
    output.reconstructions.mul_(2)


@pytest.mark.parametrize("folder", sorted((ROOT / "pretrained").iterdir()), ids=lambda folder: folder.name)
def test_a_shipped_model_tells_a_stained_nut_from_a_good_one(folder: Path) -> None:
    pipe = DiffusionADPipeline.from_pretrained(folder)
    output = pipe([open_image(HAZELNUT / "test" / name) for name in ("colour/00.jpg", "good/04.jpg")], output_type="np")
    assert output.is_anomalous.tolist() == [True, False]
    truth = np.asarray(Image.open(HAZELNUT / "ground_truth" / "colour" / "00.png")) > 0
    found, good = output.predicted_masks[..., 0]
    assert found[truth].mean() > 0.5 > found[~truth].mean() * 20 and good.mean() < 0.01


@pytest.mark.slow
def test_bfloat16_maps_are_close() -> None:
    """Within 0.02 of float32 at every pixel, which takes a first convolution in float32."""
    image = open_image(HAZELNUT / "test" / "colour" / "00.jpg")
    exact, half, cast = (DiffusionADPipeline.from_pretrained(ROOT / "pretrained" / "hazelnut") for _ in range(3))
    half.unet.to(torch.bfloat16)
    half.segmentation.cast(torch.bfloat16)
    cast.to(torch.bfloat16)
    assert half.segmentation.dtype == torch.bfloat16 and half.segmentation.input_dtype == torch.float32
    side = 256 if fastest_dtype("cpu") == torch.bfloat16 else 128  # a processor that emulates it would take minutes
    size = {"height": side, "width": side}
    maps, near, far = (pipe(image, output_type="pt", **size).anomaly_maps for pipe in (exact, half, cast))
    assert 0 < (near - maps).abs().max() < 0.02
    assert (near - maps).abs().mean() < 0.8 * (far - maps).abs().mean()


def test_bfloat16_end_to_end(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> None:
    exact = tiny_pipeline(make_images(2), output_type="pt")
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = DiffusionADPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.unet.dtype == loaded.segmentation.dtype == torch.bfloat16
    output = loaded(make_images(2), output_type="pt")
    assert output.anomaly_maps[0].dtype == output.anomaly_scores.dtype == torch.float32
    for ours, expected in zip(output.anomaly_maps, exact.anomaly_maps):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0.02)
    again = loaded(make_images(2), output_type="pt")
    assert torch.equal(again.anomaly_scores, output.anomaly_scores)
    # Laid out for speed on a CPU, but not in files, and never what somebody else may use too.
    channels_last = not torch.cuda.is_available()
    for network in (loaded.unet, loaded.segmentation):
        convolution = next(p for p in network.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
        assert convolution.is_contiguous() != channels_last
    loaded.save_pretrained(tmp_path / "half")
    saved = DiffusionADPipeline.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert torch.equal(saved(make_images(2), output_type="pt").anomaly_scores, output.anomaly_scores)
    unet = type(loaded.unet).from_config(loaded.unet.config).to(torch.bfloat16)
    assert DiffusionADPipeline.from_pretrained(tmp_path, unet=unet, dtype=torch.bfloat16).unet is unet
    assert all(parameter.is_contiguous() for parameter in unet.parameters())
    automatic = DiffusionADPipeline.from_pretrained(tmp_path, dtype="auto")
    assert automatic.unet.dtype == fastest_dtype("cuda" if torch.cuda.is_available() else "cpu")
    assert DiffusionADPipeline.from_pretrained(tmp_path).unet.dtype == torch.float32
    assert fastest_dtype("meta") == torch.float32


def test_batch_norm_is_folded(tiny_pipeline: DiffusionADPipeline, tmp_path: Path) -> None:
    exact = tiny_pipeline(make_images(2, 40), output_type="np")
    original = tiny_pipeline.segmentation
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    tiny_pipeline.fold_batch_norm()
    folded = tiny_pipeline.segmentation
    assert folded.config.norm_type == "none" and original.config.norm_type == "batch"
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in original.state_dict().items())
    output = tiny_pipeline(make_images(2, 40), output_type="np")
    np.testing.assert_allclose(output.anomaly_scores, exact.anomaly_scores, rtol=0, atol=1e-5)
    tiny_pipeline.fold_batch_norm()  # nothing left to fold
    tiny_pipeline.save_pretrained(tmp_path)
    again = DiffusionADPipeline.from_pretrained(tmp_path)(make_images(2, 40), output_type="np")
    np.testing.assert_array_equal(again.anomaly_scores, output.anomaly_scores)
    with pytest.raises(ValueError, match="only batch normalisation"):
        SegmentationUNet2DModel(base_channels=8, norm_type="group").fold_batch_norm()


@pytest.mark.slow
def test_compiled_networks_say_the_same(tiny_pipeline: DiffusionADPipeline) -> None:
    exact = tiny_pipeline(make_images(1), output_type="pt")
    names = list(tiny_pipeline.unet.state_dict())
    assert tiny_pipeline.compile(
        backend="eager", mode=None
    )  # traces the networks, and spares the test the C++ compiler
    output = tiny_pipeline(make_images(1), output_type="pt")
    torch.testing.assert_close(output.anomaly_maps, exact.anomaly_maps, rtol=0, atol=1e-5)
    assert list(tiny_pipeline.unet.state_dict()) == names
    torch._dynamo.reset()


def test_without_a_compiler_compile_says_so_and_changes_nothing(tiny_pipeline, monkeypatch, caplog) -> None:
    import torch._inductor.config as inductor

    exact = tiny_pipeline(make_images(1), output_type="pt")
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    assert not tiny_pipeline.compile()
    assert "stay uncompiled" in caplog.text and "C++ compiler" in caplog.text
    assert torch.equal(tiny_pipeline(make_images(1), output_type="pt").anomaly_maps, exact.anomaly_maps)
    torch._dynamo.reset()


def test_too_many_noises_are_said(tiny_pipeline: DiffusionADPipeline) -> None:
    for count in (10**12, 10**16):  # more than any memory, and more than torch can count
        for generator in (None, torch.Generator().manual_seed(0)):
            with pytest.raises(MemoryError, match=f"num_noise_samples={count} at 32 x 32 pixels: use fewer"):
                tiny_pipeline(make_images(1), num_noise_samples=count, generator=generator)
    tiny_pipeline.enable_tiling(32)
    with pytest.raises(MemoryError, match=f"num_noise_samples={10**12}, batch_size=8 and tile_size=32"):
        tiny_pipeline(make_images(1, 64), num_noise_samples=10**12)


def test_out_of_memory_names_the_cure(tiny_pipeline: DiffusionADPipeline) -> None:
    with (
        pytest.raises(MemoryError, match="batch_size=3: use a smaller"),
        explained_out_of_memory("batch_size=3", "a smaller batch_size"),
    ):
        torch.empty(2**52)
    with pytest.raises(RuntimeError, match="shape"), explained_out_of_memory("", ""):
        torch.zeros(2).reshape(3)


@OVERLAPPED
@pytest.mark.parametrize("tiled", [False, True])
def test_errors_in_the_place_of_outputs(overlapped: bool, tiled: bool, tiny_pipeline: DiffusionADPipeline) -> None:
    """What cannot be read or used has its error there; the others are what they are without it."""
    if tiled:
        tiny_pipeline.enable_tiling(16)
    good = make_images(3)
    unreadable = ValueError("b.png: the file is empty")
    items: list[Any] = [good[0], unreadable, np.full((32, 32, 3), 7.0), good[1], "c.png", good[2], unreadable]
    call = tiny_pipeline._resolve(batch_size=4, output_type="np")
    outputs = list(tiny_pipeline._stream(iter(items), call, None, True, overlapped))
    assert outputs[1] is unreadable and outputs[6] is unreadable
    assert "divide 0..255" in str(outputs[2]) and isinstance(outputs[4], TypeError)
    for index, batch in ((0, [good[0], good[1]]), (3, [good[0], good[1]]), (5, [good[2]])):
        expected = tiny_pipeline(batch, output_type="np")
        place = 1 if index == 3 else 0
        assert outputs[index].anomaly_scores[0] == pytest.approx(expected.anomaly_scores[place], abs=1e-6)
    with pytest.raises(ValueError, match="the file is empty"):
        raise next(tiny_pipeline.stream([unreadable], return_exceptions=True))


def test_an_image_for_which_the_networks_give_nan_has_its_error_there(tiny_pipeline: DiffusionADPipeline) -> None:
    good = make_images(2)
    expected = tiny_pipeline(good, output_type="np").anomaly_scores

    def overflow(module: torch.nn.Module, inputs: tuple[torch.Tensor], logits: Any) -> Any:
        white = inputs[0][:, :3].flatten(1).amin(1) == 1
        logits.logits[white] = torch.inf
        return logits

    tiny_pipeline.segmentation.register_forward_hook(overflow)
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    first, second, third = tiny_pipeline.stream([good[0], white, good[1]], output_type="np", return_exceptions=True)
    assert isinstance(second, ValueError) and "gave NaN" in str(second)
    scores = [first.anomaly_scores[0], third.anomaly_scores[0]]
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="gave NaN for picture 1"):
        tiny_pipeline([good[0], white, good[1]], batch_size=1)


def test_results_at_the_networks_size(tiny_pipeline: DiffusionADPipeline) -> None:
    tiny_pipeline.register_to_config(pixel_threshold=0.5)
    images = make_images(3, 48)
    output = tiny_pipeline(images, match_input_resolution=False, output_type="pt")
    assert output.anomaly_maps.shape == output.predicted_masks.shape == (3, 1, 32, 32)
    assert output.reconstructions.shape == (3, 3, 32, 32)
    expected = tiny_pipeline(images, output_type="pt")
    assert torch.equal(output.anomaly_scores, expected.anomaly_scores)
    resized = tiny_pipeline.image_processor.resize_to(output.anomaly_maps, [image.size[::-1] for image in images])
    for one, other in zip(resized, expected.anomaly_maps, strict=True):
        assert torch.equal(one.clamp(0, 1), other)
    streamed = list(tiny_pipeline.stream(images, match_input_resolution=False, output_type="pt", batch_size=3))
    assert torch.equal(torch.cat([one.anomaly_maps for one in streamed]), output.anomaly_maps)
    tiny_pipeline.enable_tiling(32)
    tiled = tiny_pipeline(images[0], height=64, width=64, match_input_resolution=False, output_type="np")
    assert tiled.anomaly_maps.shape == (1, 64, 64, 1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'heigth'"):
        tiny_pipeline.stream(images, heigth=64)
