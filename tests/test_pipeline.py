"""The pipeline's call, with tiny real networks."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils import logging
from PIL import Image

from diffusionad_pipe import DiffusionADPipeline, find_images, open_image

ROOT = Path(__file__).parents[1]


def make_images(count: int, size: int = 32) -> list[Image.Image]:
    random = np.random.RandomState(0)
    return [Image.fromarray(random.randint(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


def test_output_types_agree(tiny_pipeline: DiffusionADPipeline) -> None:
    tiny_pipeline.register_to_config(image_threshold=0.5, pixel_threshold=0.5)
    images = make_images(2)
    pt, array, pil = (tiny_pipeline(images, output_type=kind) for kind in ("pt", "np", "pil"))
    assert pt.anomaly_maps.shape == pt.predicted_masks.shape == (2, 1, 32, 32)
    assert pt.reconstructions.shape == (2, 3, 32, 32) and pt.anomaly_scores.shape == pt.is_anomalous.shape == (2,)
    assert array.anomaly_maps.shape == array.predicted_masks.shape == (2, 32, 32, 1)
    assert array.predicted_masks.dtype == np.bool_ and pt.predicted_masks.dtype == torch.bool
    assert [m.mode for m in pil.anomaly_maps] == ["L", "L"] and [r.mode for r in pil.reconstructions] == ["RGB"] * 2
    np.testing.assert_array_equal(array.anomaly_maps[..., 0], pt.anomaly_maps[:, 0].numpy())
    np.testing.assert_array_equal(array.anomaly_scores, pt.anomaly_scores.numpy())
    np.testing.assert_array_equal(np.asarray(pil.predicted_masks[1]) > 0, array.predicted_masks[1, ..., 0])
    assert 0 <= pt.anomaly_maps.min() < pt.anomaly_maps.max() <= 1
    as_tuple = tiny_pipeline(images, output_type="pt", return_dict=False)
    assert torch.equal(as_tuple[0], pt.anomaly_maps) and len(as_tuple) == 5


def test_decisions_need_thresholds(tiny_pipeline: DiffusionADPipeline) -> None:
    output = tiny_pipeline(make_images(1), output_type="pt")
    assert output.predicted_masks is None and output.is_anomalous is None
    score = output.anomaly_scores.item()
    tiny_pipeline.register_to_config(image_threshold=score)
    assert not tiny_pipeline(make_images(1)).is_anomalous[0]
    tiny_pipeline.register_to_config(image_threshold=score - 1e-6)
    assert tiny_pipeline(make_images(1)).is_anomalous[0]


def test_scores_do_not_depend_on_batch_size_or_order(tiny_pipeline: DiffusionADPipeline) -> None:
    images = make_images(23)
    whole = tiny_pipeline(images, batch_size=23, output_type="pt")
    for batch_size in (1, 4):
        other = tiny_pipeline(images, batch_size=batch_size, output_type="pt")
        # The kernels of a convolution differ with the batch, so the last bits may.
        torch.testing.assert_close(other.anomaly_scores, whole.anomaly_scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.anomaly_maps, whole.anomaly_maps, rtol=0, atol=1e-5)
    for batch_size in (23, 1):  # within one batch size, not even the last bits differ
        reverse = tiny_pipeline(images[::-1], batch_size=batch_size, output_type="pt")
        ordered = tiny_pipeline(images, batch_size=batch_size, output_type="pt")
        assert torch.equal(reverse.anomaly_scores.flip(0), ordered.anomaly_scores)
    assert torch.equal(tiny_pipeline(images[7], output_type="pt").anomaly_scores, ordered.anomaly_scores[7:8])


def test_scores_of_a_shipped_model_hardly_depend_on_the_batch_size() -> None:
    pipe = DiffusionADPipeline.from_pretrained(ROOT / "pretrained" / "hazelnut")
    files = find_images(ROOT / "training" / "data" / "hazelnut_toy" / "hazelnut" / "test")[::5]
    images = [open_image(file) for file in files]
    alone, some, whole = (pipe(images, batch_size=size, output_type="pt") for size in (1, 4, len(images)))
    assert len(images) == 5 and alone.anomaly_scores.std() > 0.1
    for batched in (some, whole):
        torch.testing.assert_close(batched.anomaly_scores, alone.anomaly_scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(batched.anomaly_maps, alone.anomaly_maps, rtol=0, atol=1e-6)


def test_the_seed_in_the_config_makes_the_noise(tiny_pipeline: DiffusionADPipeline) -> None:
    first = tiny_pipeline(make_images(1), output_type="pt").anomaly_maps
    assert torch.equal(first, tiny_pipeline(make_images(1), output_type="pt").anomaly_maps)
    fixed = torch.randn(1, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    explicit = tiny_pipeline(make_images(1), noise=fixed.transpose(0, 1), output_type="pt").anomaly_maps
    assert torch.equal(first, explicit)
    tiny_pipeline.register_to_config(noise_seed=1)
    assert not torch.equal(first, tiny_pipeline(make_images(1), output_type="pt").anomaly_maps)


def test_generators(tiny_pipeline: DiffusionADPipeline) -> None:
    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    images = make_images(3)
    one_by_one = tiny_pipeline(images, generator=seeded(1, 2, 3), batch_size=1, output_type="pt").anomaly_maps
    assert torch.equal(one_by_one[2:], tiny_pipeline(images[2], generator=seeded(3), output_type="pt").anomaly_maps)
    shared = [
        tiny_pipeline(images, generator=seeded(1)[0], batch_size=size, output_type="pt").anomaly_maps for size in (1, 3)
    ]
    torch.testing.assert_close(*shared, rtol=0, atol=1e-5)


def test_noise_samples_are_averaged(tiny_pipeline: DiffusionADPipeline) -> None:
    noise = torch.randn(3, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    singles = [tiny_pipeline(make_images(1), noise=n[:, None], output_type="pt") for n in noise]
    mean = tiny_pipeline(make_images(1), num_noise_samples=3, output_type="pt")
    maps = torch.stack([single.anomaly_maps for single in singles]).mean(0)
    torch.testing.assert_close(mean.anomaly_maps, maps, rtol=0, atol=1e-6)
    torch.testing.assert_close(mean.anomaly_scores, maps.flatten(1).topk(50).values.mean(1), rtol=0, atol=1e-6)


def test_score_top_k(tiny_pipeline: DiffusionADPipeline) -> None:
    maps = tiny_pipeline(make_images(1), output_type="pt").anomaly_maps.flatten()
    for top_k, pixels in ((50, 50), (1, 1), (0.25, 256), (10**6, 1024), (1e-9, 1)):
        tiny_pipeline.register_to_config(score_top_k=top_k)
        score = tiny_pipeline(make_images(1), output_type="pt").anomaly_scores
        assert score.item() == pytest.approx(maps.topk(pixels).values.mean().item(), abs=1e-6)


def test_every_input_gets_its_own_size_back(tiny_pipeline: DiffusionADPipeline) -> None:
    tiny_pipeline.register_to_config(pixel_threshold=0.5)
    turned = Image.fromarray(np.zeros((20, 40, 3), dtype=np.uint8))
    turned.getexif()[0x0112] = 6  # EXIF: to be turned by a quarter
    output = tiny_pipeline([make_images(1)[0].resize((48, 64)), turned], output_type="pt")
    assert [tuple(m.shape) for m in output.anomaly_maps] == [(1, 64, 48), (1, 40, 20)]
    assert [tuple(m.shape) for m in output.predicted_masks] == [(1, 64, 48), (1, 40, 20)]
    assert [tuple(r.shape) for r in output.reconstructions] == [(3, 64, 48), (3, 40, 20)]
    pil = tiny_pipeline(turned)
    assert pil.anomaly_maps[0].size == pil.predicted_masks[0].size == pil.reconstructions[0].size == (20, 40)


def test_sizes_that_do_not_fit_are_rounded_and_said(tiny_pipeline: DiffusionADPipeline, caplog) -> None:
    logging.enable_propagation()
    try:
        output = tiny_pipeline(make_images(1), height=70, width=64, output_type="pt")
    finally:
        logging.disable_propagation()
    assert "height=70 is not a multiple of 32" in caplog.text and "using 64" in caplog.text
    assert output.anomaly_maps.shape[-2:] == (32, 32)
    exact = tiny_pipeline(make_images(1), height=64, width=64, output_type="pt")
    assert torch.equal(output.anomaly_scores, exact.anomaly_scores)


def test_scales_and_guidance_are_used(tiny_pipeline: DiffusionADPipeline) -> None:
    default = tiny_pipeline(make_images(1), output_type="pt").reconstructions
    config = tiny_pipeline.scheduler.config
    same = tiny_pipeline(
        make_images(1),
        small_timestep=config.small_timestep,
        large_timestep=config.large_timestep,
        guidance_scale=config.guidance_scale,
        output_type="pt",
    ).reconstructions
    assert torch.equal(default, same)
    for change in ({"small_timestep": 50}, {"large_timestep": 900}, {"guidance_scale": 0.0}, {"small_timestep": 0}):
        assert not torch.equal(default, tiny_pipeline(make_images(1), output_type="pt", **change).reconstructions), (
            change
        )


@pytest.mark.parametrize(
    "arguments, cause",
    [
        ({"small_timestep": 400, "large_timestep": 200}, "0 <= small < large <= 999"),
        ({"small_timestep": 300, "large_timestep": 300}, "in order"),
        ({"small_timestep": -1}, "small_timestep=-1"),
        ({"large_timestep": 1000}, "large_timestep=1000"),
        ({"num_noise_samples": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"noise": torch.zeros(2, 3, 32, 32)}, r"noise must be \[2, 1, 3, 32, 32\]"),
        ({"noise": torch.zeros(2, 1, 3, 32, 32), "num_noise_samples": 2}, "num_noise_samples=1"),
        ({"generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1 pictures"),
        ({"output_type": "latent"}, "'pil', 'np' or 'pt'"),
        ({"noise": np.zeros((2, 1, 3, 32, 32))}, "noise must be a tensor, not ndarray"),
        ({"noise": torch.full((2, 1, 3, 32, 32), torch.nan)}, "the networks gave NaN for picture 0.*the noise"),
        ({"guidance_scale": float("nan")}, "the networks gave NaN for picture 0.*guidance_scale"),
        ({"generator": 0}, "generator=0 is none: use torch.Generator"),
        ({"generator": [None]}, "generator=None is none"),
        ({"small_timestep": 1.5}, "whole numbers, not 1.5"),
        ({"large_timestep": "300"}, "whole numbers, not '300'"),
        ({"batch_size": 2.5}, "whole numbers, not 2.5"),
        ({"num_noise_samples": True}, "whole numbers, not True"),
        ({"height": 0}, "height=0 is outside 1 ... 8192"),
        ({"width": 32.5}, "width=32.5 is outside 1 ... 8192 whole pixels"),
        ({"height": 100_000}, "outside 1 ... 8192"),
        ({"width": -5}, "outside 1 ... 8192"),
    ],
)
def test_bad_arguments(tiny_pipeline: DiffusionADPipeline, arguments: dict, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        tiny_pipeline(make_images(1), **arguments)


@pytest.mark.parametrize(
    "image, cause",
    [
        ([], "at least one|no picture|empty"),
        (np.full((32, 32, 3), np.nan), "NaN|finite"),
        ("picture.png", "open_image"),
        (np.zeros((3, 32, 32)), "transpose"),
        ([np.zeros((32, 32, 3)), np.full((32, 32, 3), 7.0)], "picture 1"),
    ],
)
def test_bad_images(tiny_pipeline: DiffusionADPipeline, image, cause: str) -> None:
    with pytest.raises((ValueError, TypeError), match=cause):
        tiny_pipeline(image)


def test_broken_weights_do_not_call_an_image_good(tiny_pipeline: DiffusionADPipeline) -> None:
    tiny_pipeline.register_to_config(image_threshold=0.5)
    for broken in (torch.nan, -torch.inf):  # a float16 that overflows is infinite
        with torch.no_grad():
            tiny_pipeline.segmentation.conv_out.bias.fill_(broken)
        for image in make_images(1)[0], make_images(1, 80)[0]:
            tiny_pipeline.enable_tiling(64)  # one picture resized, one in tiles
            with pytest.raises(ValueError, match="the networks gave NaN for picture 0: their weights"):
                tiny_pipeline(image)


def test_bad_configuration(tiny_pipeline: DiffusionADPipeline) -> None:
    parts = tiny_pipeline.components
    for options, cause in (
        ({"image_size": 10**9}, "outside 1"),
        ({"image_size": "x"}, "image_size='x' is outside 1"),
        ({"score_top_k": 0}, "whole number"),
        ({"score_top_k": 2.5}, "whole number"),
        ({"noise_seed": 2**64}, "64 bits"),
        ({"image_threshold": float("nan")}, "image_threshold=nan must be a finite number"),
        ({"pixel_threshold": "abc"}, "pixel_threshold='abc' must be a finite number"),
        ({"scheduler": DDIMScheduler()}, "a DDIMScheduler stands in place of a NormGuidedOneStepScheduler"),
        ({"unet": parts["segmentation"]}, "in place of a DiffusionADUNet2DModel"),
    ):
        with pytest.raises(ValueError, match=cause):
            DiffusionADPipeline(**{**parts, **options})
        if not options.keys() & parts.keys():  # nor can it be set later
            before = dict(tiny_pipeline.config)
            with pytest.raises(ValueError, match=cause):
                tiny_pipeline.register_to_config(**{"noise_seed": 1, **options})
            assert dict(tiny_pipeline.config) == before
    # NumPy's numbers are numbers.
    DiffusionADPipeline(**{**parts, "image_size": np.int64(32), "image_threshold": np.float32(0.5)})


def test_two_threads_share_a_pipeline(tiny_pipeline: DiffusionADPipeline) -> None:
    images = make_images(2)
    scales = ((10, 900), (200, 400))
    expected = [
        tiny_pipeline(images, small_timestep=s, large_timestep=b, output_type="pt").anomaly_maps for s, b in scales
    ]
    wrong = []

    def work(index: int) -> None:
        small, large = scales[index]
        for _ in range(5):
            output = tiny_pipeline(images, small_timestep=small, large_timestep=large, output_type="pt")
            if not torch.allclose(output.anomaly_maps, expected[index], rtol=0, atol=1e-6):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_progress_bar_for_many_images(tiny_pipeline: DiffusionADPipeline, capsys) -> None:
    tiny_pipeline(make_images(1))
    assert "it" not in capsys.readouterr().err
    tiny_pipeline(make_images(4), batch_size=1)
    assert "4/4" in capsys.readouterr().err


def test_components_are_not_changed_by_a_call(tiny_pipeline: DiffusionADPipeline) -> None:
    before = {k: v.clone() for k, v in tiny_pipeline.segmentation.state_dict().items()}
    config = dict(tiny_pipeline.scheduler.config)
    tiny_pipeline(make_images(2), small_timestep=10, guidance_scale=3.0)
    assert all(torch.equal(v, before[k]) for k, v in tiny_pipeline.segmentation.state_dict().items())
    assert dict(tiny_pipeline.scheduler.config) == config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny_pipeline: DiffusionADPipeline, dtype: torch.dtype) -> None:
    expected = tiny_pipeline(make_images(2), output_type="pt").anomaly_maps
    actual = tiny_pipeline.to(dtype)(make_images(2), output_type="pt").anomaly_maps
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.05)
