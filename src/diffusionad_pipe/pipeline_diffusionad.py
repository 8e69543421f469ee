"""DiffusionAD as a diffusers pipeline: a picture in, an anomaly map and a score out, one denoising step between."""

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from math import lcm
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .image_processor import DiffusionADImageProcessor, ImageInput
from .loading import COMPONENTS, WeightsFileError, check_pipeline_folder, download_pipeline
from .runtime.acceleration import compile_networks, explained_out_of_memory, fastest_dtype
from .runtime.config_values import is_finite, is_whole
from .runtime.prefetch import prefetched
from .scheduling_norm_guided_one_step import NormGuidedOneStepScheduler
from .single_file import build_networks, build_scheduler, read_checkpoint, write_checkpoint
from .tiling import Tiling, call_in_tiles
from .unet_2d_diffusionad import DiffusionADUNet2DModel
from .unet_2d_segmentation import SegmentationUNet2DModel

logger = logging.get_logger(__name__)

# (pipeline, number of the noise, timesteps [2B], tensors of the step)
StepCallback = Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], object]

# No picture side above this: a damaged model_index.json must not ask for terabytes.
MAX_SIDE = 8192
DEFAULT_BATCH_SIZE = 8


@dataclass
class DiffusionADPipelineOutput(BaseOutput):
    """Output of [`DiffusionADPipeline`]. Maps, pictures and masks have the size of each input picture.

    Args:
        anomaly_maps: probability of an anomaly at each pixel, in [0, 1]. `"pt"`: `[B, 1, H, W]`, `"np"`:
            `[B, H, W, 1]`, `"pil"`: pictures of mode L (1 is 255). Inputs of different sizes give a list.
        anomaly_scores: `[B]`, in [0, 1]: the mean of the largest pixels at the model's size. An array, or a tensor
            for `"pt"`.
        reconstructions: the anomaly-free pictures, in [0, 1]. `"pt"`: `[B, 3, H, W]`, `"np"`: `[B, H, W, 3]`.
        predicted_masks: where the map is above `pixel_threshold`, booleans in the layout of the maps (`"pil"`: mode
            L, 0 or 255). None without that threshold.
        is_anomalous: `[B]`, where the score is above `image_threshold`. None without that threshold.
    """

    anomaly_maps: Any
    anomaly_scores: Any
    reconstructions: Any
    predicted_masks: Any
    is_anomalous: Any


class DiffusionADPipeline(DiffusionPipeline):
    """Finds defects in pictures by comparing each with its anomaly-free reconstruction (arXiv 2303.08730).

    Args:
        unet: the reconstruction network, [`DiffusionADUNet2DModel`].
        segmentation: compares picture and reconstruction: [`SegmentationUNet2DModel`], or transformers'
            `SegformerForSemanticSegmentation(num_channels=6, num_labels=1)`.
        scheduler: [`NormGuidedOneStepScheduler`].
        image_size: side in pixels to which pictures are resized by default.
        score_top_k: the image score is the mean of this many largest pixels of the map. A number below 1 is a share
            of the pixels, which keeps its meaning at other sizes. 50 at 256×256 in the paper.
        noise_seed: seed of the fixed noise that is used when no generator is given.
        image_threshold: a picture is anomalous when its score is above; None if not calibrated.
        pixel_threshold: a pixel is anomalous when the map is above; None if not calibrated.

    Raises:
        ValueError: for values outside their ranges.
    """

    model_cpu_offload_seq = "unet->segmentation"

    def __init__(
        self,
        unet: DiffusionADUNet2DModel,
        segmentation: nn.Module,
        scheduler: NormGuidedOneStepScheduler,
        image_size: int = 256,
        score_top_k: int | float = 50,
        noise_seed: int = 0,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
    ):
        super().__init__()
        # Other schedulers of diffusers are often put in place of a pipeline's own, and fail only in the call.
        for part, kind in ((unet, DiffusionADUNet2DModel), (scheduler, NormGuidedOneStepScheduler)):
            if part is not None and not isinstance(part, kind):
                raise ValueError(f"a {type(part).__name__} stands in place of a {kind.__name__}")
        self.register_modules(unet=unet, segmentation=segmentation, scheduler=scheduler)
        self.register_to_config(
            image_size=image_size,
            score_top_k=score_top_k,
            noise_seed=noise_seed,
            image_threshold=image_threshold,
            pixel_threshold=pixel_threshold,
        )
        self.image_processor = DiffusionADImageProcessor()
        self.tiling: Tiling | None = None
        self._records_cuda_graphs = False
        self._fixed_noise: tuple[Any, torch.Tensor] | None = None  # the last one drawn, and what it was drawn for

    def register_to_config(self, **values: Any) -> None:
        """Set values of the config, such as `image_threshold=0.4`, in place of those that the constructor was given.

        Raises:
            ValueError: for values outside their ranges; nothing is then set.
        """
        side, top_k, seed = (values.get(name, 1) for name in ("image_size", "score_top_k", "noise_seed"))
        if not is_whole(side) or not 1 <= side <= MAX_SIDE:
            raise ValueError(f"image_size={side!r} is outside 1 ... {MAX_SIDE} whole pixels")
        if not is_finite(top_k) or top_k <= 0 or (top_k >= 1 and top_k != int(top_k)):
            raise ValueError(f"score_top_k={top_k!r} must be a whole number of pixels, or a share below 1")
        if not is_whole(seed) or not -(2**63) <= seed < 2**64:
            raise ValueError(f"noise_seed={seed!r} must be a whole number of 64 bits")
        for name in ("image_threshold", "pixel_threshold"):
            threshold = values.get(name)
            if threshold is not None and not is_finite(threshold):
                raise ValueError(f"{name}={threshold!r} must be a finite number, or None")
        super().register_to_config(**values)

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | list[ImageInput],
        *,
        height: int | None = None,
        width: int | None = None,
        small_timestep: int | None = None,
        large_timestep: int | None = None,
        guidance_scale: float | None = None,
        num_noise_samples: int = 1,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> Any:
        """Detect anomalies.

        Args:
            image: a picture, or a list of pictures of any sizes: PIL, arrays `[H, W, C]` or tensors `[C, H, W]`
                (uint8, uint16, or floats in [0, 1]), or a batched array `[B, H, W, C]` or tensor `[B, C, H, W]`.
            height: height in pixels at which the networks work; None is the pipeline's `image_size`. With tiling: to
                which pictures are resized before they are cut; None is their own.
            width: likewise. Both are rounded to what the networks can take, with a warning.
            small_timestep: t_s, the small noise scale; None takes the scheduler's. It, the large one and the guidance
                scale are built into a distilled model, which takes no others.
            large_timestep: t_b, the large noise scale; None takes the scheduler's.
            guidance_scale: w, the weight of the norm guidance; None takes the scheduler's, 0 is none.
            num_noise_samples: average map and reconstruction over this many noises: slower, steadier.
            noise: `[2, B, 3, height, width]` to be used, small scale first.
            generator: draws the noise, or a list with one for each picture. None: the noise is a fixed function of
                the size and the pipeline's `noise_seed`, the same for every picture, so that a picture's score does
                not depend on its batch, its order or the run.
            batch_size: pictures, or tiles, in one pass of the networks; None is 8.
            output_type: `"pil"`, `"np"` or `"pt"`.
            return_dict: False returns a tuple in the order of the output's fields.
            callback_on_step_end: called as `callback(pipe, index, timesteps, tensors)` after the denoising step of
                each noise of each batch. The tensors are the fields of [`NormGuidedOneStepSchedulerOutput`]. What it
                raises ends the call.

        Returns:
            [`DiffusionADPipelineOutput`].

        Raises:
            ValueError: for pictures or arguments that cannot be used; the message says which and what to do.
            MemoryError: names the settings that asked for too much.
        """
        # 0. Arguments that are None come from the pipeline's or the scheduler's config.
        config = self.scheduler.config
        if config.distilled:
            self._refuse_changes(
                small_timestep=small_timestep, large_timestep=large_timestep, guidance_scale=guidance_scale
            )
        small_timestep = config.small_timestep if small_timestep is None else small_timestep
        large_timestep = config.large_timestep if large_timestep is None else large_timestep
        batch_size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
        if self.tiling is not None:  # pictures one by one, each tile by tile if it is larger than one
            tiled = call_in_tiles(
                self,
                image,
                self.tiling,
                height=height,
                width=width,
                small_timestep=small_timestep,
                large_timestep=large_timestep,
                guidance_scale=guidance_scale,
                num_noise_samples=num_noise_samples,
                noise=noise,
                generator=generator,
                batch_size=batch_size,
                output_type=output_type,
                callback_on_step_end=callback_on_step_end,
            )
            return tiled if return_dict else _as_tuple(tiled)
        height = self.round_size(self.config.image_size if height is None else height, "height")
        width = self.round_size(self.config.image_size if width is None else width, "width")

        # 1. Pictures of any kind and size become one tensor.
        images, sizes = self.image_processor.preprocess(image, height, width)  # [N, 3, H, W] in [0, 1]
        self.check_inputs(
            images, small_timestep, large_timestep, num_noise_samples, noise, generator, batch_size, output_type
        )

        # 2. Noise [K, 2, N, 3, H, W]. The fixed noise is shared by all pictures. A generator draws picture by picture,
        #    so that the batch size plays no part.
        device = self._execution_device
        used = f"num_noise_samples={num_noise_samples} at {height} x {width} pixels"
        with explained_out_of_memory(used, "fewer noise samples"):
            if noise is not None:
                noises = noise[None]
            elif generator is None:
                fixed = self.fixed_noise(num_noise_samples, height, width)  # [K, 2, 1, 3, H, W]
                noises = fixed.expand(-1, -1, len(images), -1, -1, -1)
            else:
                generators = generator if isinstance(generator, list) else [generator] * len(images)
                noise_shape = (num_noise_samples, 2, 3, height, width)
                drawn = [randn_tensor(noise_shape, generator=g, device=device, dtype=torch.float32) for g in generators]
                noises = torch.stack(drawn, dim=2)

        # 3. Reconstruct the pictures and compare, batch by batch.
        timesteps = torch.tensor([small_timestep, large_timestep], dtype=torch.int64, device=device)
        maps, reconstructions = torch.empty_like(images[:, :1]), torch.empty_like(images)
        starts = range(0, len(images), batch_size)
        used = f"batch_size={batch_size} at {height} x {width} pixels"
        for start in starts if len(starts) == 1 else self.progress_bar(starts):
            items = slice(start, start + batch_size)
            with torch.inference_mode(), explained_out_of_memory(used, "a smaller batch_size"):
                batch = images[items].to(device)
                detected = self.detect(batch, noises[:, :, items], timesteps, guidance_scale, callback_on_step_end)
                maps[items], reconstructions[items] = detected
        self.maybe_free_model_hooks()

        output = self.to_output(maps, reconstructions, sizes, output_type)
        return output if return_dict else _as_tuple(output)

    def detect(
        self,
        images: torch.Tensor,
        noises: torch.Tensor,
        timesteps: torch.Tensor,
        guidance_scale: float | None = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The method itself, on tensors of the networks' size: what `__call__`, tiles and an exported graph share.

        Args:
            images: `[B, 3, H, W]` in [0, 1].
            noises: `[K, 2, B, 3, H, W]`, small scale first; map and reconstruction are the mean over the K.
            timesteps: `[2]`, (t_s, t_b). A distilled network sees the first alone, and its noise.
            guidance_scale: w; None takes the scheduler's.
            callback_on_step_end: as `__call__` takes it.

        Returns:
            The anomaly maps `[B, 1, H, W]` and the reconstructions `[B, 3, H, W]`, both in [0, 1].
        """
        scales = self.scheduler.num_scales
        # [2B], so written that B stays free in an exported graph: len() or repeat_interleave would fix it there.
        both_timesteps = timesteps[:scales, None].expand(-1, images.shape[0]).flatten()
        maps, reconstructions = torch.zeros_like(images[:, :1]), torch.zeros_like(images)
        for index, noise in enumerate(noises):
            # 1. Noise the pictures at both scales: [2B, 3, H, W], small scale first. (B for 2B when distilled.)
            both_noises = noise[:scales].to(images.device, images.dtype).flatten(0, 1)
            noised = self.scheduler.add_noise(torch.cat([images] * scales), both_noises, both_timesteps)

            # 2. One call of the UNet for both, and norm guidance. Only the networks run in their own dtype.
            model_output = self.unet(noised.to(self.unet.dtype), both_timesteps).sample.to(images.dtype)
            step = self.scheduler.step(model_output, both_timesteps, noised, guidance_scale)
            guided = step.prev_sample
            # Before the next network runs: CUDA graphs give their outputs' memory to it.
            reconstructions = reconstructions + guided / len(noises)
            if callback_on_step_end is not None:
                callback_on_step_end(self, index, both_timesteps, dict(step))

            # 3. Compare the pictures with their reconstructions.
            pairs = torch.cat([images, guided], dim=1)  # [B, 6, H, W]
            pairs = pairs.to(getattr(self.segmentation, "input_dtype", self.segmentation.dtype))
            logits = self.segmentation(pairs).logits.to(images.dtype)
            if logits.shape[-2:] != images.shape[-2:]:  # a SegFormer answers at a quarter of the size
                logits = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
            # An infinite logit is an overflow, no certainty: as NaN it is refused, and not taken for a good pixel.
            maps = maps + torch.where(logits.isfinite(), logits.sigmoid(), torch.nan) / len(noises)
        return maps, reconstructions.clamp(0, 1)

    def fixed_noise(self, num_noise_samples: int, height: int, width: int) -> torch.Tensor:
        """The noise that is used without a generator, a function of the size and `noise_seed` alone: drawn on the CPU
        whatever the device, once for many calls.

        Returns:
            `[num_noise_samples, 2, 1, 3, height, width]` on the pipeline's device, small scale first.
        """
        shape, seed = (num_noise_samples, 2, 3, height, width), self.config.noise_seed
        wanted = (shape, seed, self._execution_device)
        known = self._fixed_noise  # read once: another thread may replace it meanwhile
        if known is None or known[0] != wanted:
            drawing = torch.Generator("cpu").manual_seed(seed)
            drawn = torch.randn(shape, generator=drawing, dtype=torch.float32, device="cpu")
            known = self._fixed_noise = (wanted, drawn[:, :, None].to(self._execution_device))
        return known[1]

    def to_output(
        self,
        maps: torch.Tensor,
        reconstructions: torch.Tensor,
        sizes: list[tuple[int, int]],
        output_type: str,
        score_area: int | None = None,
    ) -> DiffusionADPipelineOutput:
        """Scores, decisions, and everything at the pictures' own sizes and in the caller's kind.

        Args:
            maps: `[N, 1, H, W]` on the CPU.
            reconstructions: `[N, 3, H, W]` on the CPU.
            sizes: (height, width) of each picture.
            output_type: `"pil"`, `"np"` or `"pt"`.
            score_area: the pixels that a `score_top_k` below 1 is a share of; None is H · W.
        """
        # 1. Score at the size of the maps (paper, section IV-A): the mean of the largest pixels.
        area = maps[0].numel()
        top_k = self.config.score_top_k
        pixels = int(top_k) if top_k >= 1 else round(top_k * (score_area or area))
        scores = maps.flatten(1).topk(min(max(pixels, 1), area)).values.mean(1)  # [N]
        if not scores.isfinite().all():  # NaN is above no threshold, so the picture would pass as good
            first = scores.isfinite().int().argmin()
            raise ValueError(
                f"the networks gave NaN for picture {first}: their weights, the noise or guidance_scale hold NaN, or "
                "float16 overflowed; use others, or dtype=torch.bfloat16"
            )

        # 2. Decisions, where thresholds are set; pixels are judged at the pictures' own sizes.
        resized = self.image_processor.resize_to(maps, sizes)  # [1, h, w] each
        masks: Any = None
        is_anomalous: Any = None
        if self.config.pixel_threshold is not None:
            masks = self.image_processor.convert([m > self.config.pixel_threshold for m in resized], output_type)
        if self.config.image_threshold is not None:
            is_anomalous = scores > self.config.image_threshold
            is_anomalous = is_anomalous if output_type == "pt" else is_anomalous.numpy()

        return DiffusionADPipelineOutput(
            self.image_processor.convert([m.clamp(0, 1) for m in resized], output_type),
            scores if output_type == "pt" else scores.numpy(),
            self.image_processor.postprocess(reconstructions, output_type, sizes),
            masks,
            is_anomalous,
        )

    def stream(
        self,
        images: Iterable[ImageInput],
        *,
        batch_size: int | None = None,
        output_type: str = "pil",
        **arguments: Any,
    ) -> Iterator[DiffusionADPipelineOutput]:
        """Detect anomalies in any number of pictures, while the next are read and the last are being used.

        `for output in pipe.stream(map(open_image, files)): ...` decodes, predicts and saves at once: one thread takes
        pictures from `images` and resizes them, a second runs the networks (the caller's, where they are compiled:
        CUDA graphs stay in their thread), and this iterator makes the output; at most two batches wait between two
        stages. On a CPU only `images` has a thread of its own, at most a batch ahead: the networks use every core, and
        what runs beside them makes them wait. A picture's output is that of a call with the same batch size.

        Args:
            images: single pictures of any kind and size; an iterator is read in the background, as results are asked
                for, and never far ahead.
            batch_size: pictures in one pass of the networks, or tiles; None is 8.
            output_type: `"pil"`, `"np"` or `"pt"`.
            arguments: further ones of `__call__`, but `noise`, and `generator` as one for all.

        Yields:
            [`DiffusionADPipelineOutput`] of one picture, B = 1, in the order of `images`.

        Raises:
            ValueError: as `__call__` does, and whatever `images` raises, after the outputs of all batches before.
        """
        batch_size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if "noise" in arguments or isinstance(arguments.get("generator"), list):
            raise ValueError("the number of pictures in a stream is not known: give one generator for all, or none")
        if "return_dict" in arguments:
            raise ValueError("a stream yields outputs, not tuples: leave return_dict out")
        overlapped = self._execution_device.type != "cpu"
        return self._stream(images, batch_size, output_type, {**arguments, "batch_size": batch_size}, overlapped)

    def _stream(
        self,
        images: Iterable[ImageInput],
        batch_size: int,
        output_type: str,
        arguments: dict[str, Any],
        overlapped: bool,
    ) -> Iterator[DiffusionADPipelineOutput]:
        ahead: Callable[[Iterable[Any]], Iterator[Any]] = prefetched if overlapped else iter
        # CUDA graphs belong to the thread that recorded them; another would record them again.
        detect_ahead = iter if self._records_cuda_graphs else ahead
        if self.tiling is not None:
            yield from detect_ahead(self(image, output_type=output_type, **arguments) for image in prefetched(images))
            return
        height, width = arguments.pop("height", None), arguments.pop("width", None)
        height = self.round_size(self.config.image_size if height is None else height, "height")
        width = self.round_size(self.config.image_size if width is None else width, "width")

        def preprocess() -> Iterator[tuple[torch.Tensor, list[tuple[int, int]]]]:
            remaining = iter(images) if overlapped else prefetched(images, batch_size)
            while batch := list(islice(remaining, batch_size)):
                prepared = self.image_processor.preprocess(batch, height, width)
                del batch  # pictures of full size need not wait for the networks
                yield prepared

        def detect() -> Iterator[tuple[Any, list[tuple[int, int]]]]:
            for tensors, sizes in ahead(preprocess()):
                yield self(tensors, height=height, width=width, output_type="pt", **arguments), sizes

        for output, sizes in detect_ahead(detect()):
            for index, size in enumerate(sizes):
                item = slice(index, index + 1)
                yield self.to_output(output.anomaly_maps[item], output.reconstructions[item], [size], output_type)

    def enable_tiling(self, tile_size: int | None = None, overlap: float = 0.25) -> None:
        """From now on, take pictures larger than a tile at their own size, tile by tile ([`tiling`] tells how).

        The networks then see details that resizing the whole picture would wipe out; they must have been trained at
        that scale (`training/train.py --resize_to`). Memory is that of a batch of tiles, beside the picture and its
        results.

        Args:
            tile_size: side of a tile in pixels; None is the pipeline's `image_size`. Rounded to what the networks
                can take, with a warning.
            overlap: the least share of a tile's side that it has in common with the next, in [0, 1).

        Raises:
            ValueError: for values outside their ranges.
        """
        if not 0 <= overlap < 1:
            raise ValueError(
                f"overlap={overlap} must be in [0, 1): the share of a tile's side that the next one shares"
            )
        self.tiling = Tiling(self.round_size(tile_size or self.config.image_size, "tile_size"), overlap)

    def disable_tiling(self) -> None:
        """From now on, resize every picture to the networks' size again."""
        self.tiling = None

    def fold_batch_norm(self) -> None:
        """Fold the batch normalisation of the segmentation network into its convolutions: the same function with half
        the layers, to be saved and loaded as any other, but no longer to be trained. Other networks stay as they are.
        """
        if isinstance(self.segmentation, SegmentationUNet2DModel) and self.segmentation.config.norm_type == "batch":
            self.register_modules(segmentation=self.segmentation.fold_batch_norm())

    def compile(self, **options: Any) -> bool:
        """Compile both networks with `torch.compile`, in place. Their first call for each batch size and picture size
        takes long. torch keeps what it compiled in the folder that `TORCHINDUCTOR_CACHE_DIR` names, for later runs.

        Args:
            options: of `torch.compile`. By default `dynamic=False`, and on CUDA `mode="reduce-overhead"`, which
                records CUDA graphs.

        Returns:
            Whether it was done. Where there is no working compiler (no C++ compiler on a CPU, no Triton on a GPU, a
            Python that torch does not support yet) a warning says why, and the networks stay as they are.
        """
        device = self._execution_device
        defaults = {"dynamic": False, "mode": "reduce-overhead" if device.type == "cuda" else None}
        compiled = compile_networks([self.unet, self.segmentation], device, **{**defaults, **options})
        self._records_cuda_graphs = compiled and device.type == "cuda"
        return compiled

    def check_inputs(
        self,
        images: torch.Tensor,
        small_timestep: int,
        large_timestep: int,
        num_noise_samples: int,
        noise: torch.Tensor | None,
        generator: torch.Generator | list[torch.Generator] | None,
        batch_size: int,
        output_type: str,
    ) -> None:
        """Raise a ValueError for arguments of `__call__` that cannot be used."""
        for number in (small_timestep, large_timestep, num_noise_samples, batch_size):
            if not is_whole(number):
                raise ValueError(f"timesteps, num_noise_samples and batch_size are whole numbers, not {number!r}")
        last = len(self.scheduler) - 1
        if not 0 <= small_timestep < large_timestep <= last:
            raise ValueError(
                f"small_timestep={small_timestep} and large_timestep={large_timestep} must be in order, "
                f"0 <= small < large <= {last}"
            )
        if num_noise_samples < 1 or batch_size < 1:
            raise ValueError(f"num_noise_samples={num_noise_samples} and batch_size={batch_size} must be at least 1")
        if noise is not None and not isinstance(noise, torch.Tensor):
            raise ValueError(f"noise must be a tensor, not {type(noise).__name__}: use torch.as_tensor(noise)")
        expected = (2, *images.shape)
        if noise is not None and (tuple(noise.shape) != expected or num_noise_samples != 1 or generator is not None):
            raise ValueError(
                f"noise must be {list(expected)} ([2, B, 3, height, width], small scale first), not "
                f"{list(noise.shape)}, without a generator and with num_noise_samples=1"
            )
        for one in generator if isinstance(generator, list) else [generator]:
            if not isinstance(one, torch.Generator) and generator is not None:
                raise ValueError(f"generator={one!r} is none: use torch.Generator().manual_seed(0), or a list of them")
        if isinstance(generator, list) and len(generator) != len(images):
            raise ValueError(
                f"{len(generator)} generators for {len(images)} pictures: give one for each, or one for all"
            )
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', not {output_type!r}")

    def _refuse_changes(self, **settings: Any) -> None:
        """Raise a ValueError for settings that are not the scheduler's."""
        for name, value in settings.items():
            if value is not None and value != self.scheduler.config[name]:
                raise ValueError(
                    f"{name}={value} cannot be had of a distilled model: {self.scheduler.config[name]} is built in. "
                    "Use the model that it was distilled from"
                )

    def round_size(self, size: int, name: str = "size") -> int:
        """The nearest size that the networks can take.

        Args:
            size: height or width in pixels.
            name: what the messages call it.

        Raises:
            ValueError: for a size below 1 or above 8192 pixels.
        """
        if not is_whole(size) or not 1 <= size <= MAX_SIDE:
            raise ValueError(f"{name}={size!r} is outside 1 ... {MAX_SIDE} whole pixels")
        divisor = lcm(self.unet.size_divisor, getattr(self.segmentation, "size_divisor", 32))
        rounded = max(divisor, round(size / divisor) * divisor)
        if rounded != size:
            logger.warning(f"{name}={size} is not a multiple of {divisor}, which the networks need: using {rounded}")
        return rounded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any):
        """Load a pipeline from a folder or from the Hugging Face Hub; safetensors only.

        Args:
            pretrained_model_name_or_path: a folder that `save_pretrained` wrote, or a Hub id such as `"user/model"`.
            kwargs: those of diffusers (`dtype`, `variant`, `revision`, `token`, `cache_dir`, `local_files_only`, ...),
                components, or values for the pipeline's config such as `image_threshold=0.4`. `dtype` is that of the
                networks, but for the segmentation network's first convolution; the rest is computed in float32. None
                loads float32, with which thresholds are calibrated and results documented; `"auto"` loads bfloat16
                where the GPU, or the CPU if there is none, has instructions for it, and float32 elsewhere. Where there
                is no GPU, weights in bfloat16 are laid out channels last, which is faster (benchmarks/README.md).

        Raises:
            WeightsFileError: the folder or a file is missing, damaged, a pickle, or does not fit; the message names it.
        """
        if kwargs.pop("use_safetensors", True) is False:
            raise WeightsFileError("only safetensors are loaded: a pickle could run code. Leave use_safetensors out")
        dtype = kwargs.pop("torch_dtype", None) if kwargs.get("dtype") is None else kwargs["dtype"]
        if isinstance(dtype, str) and dtype == "auto":
            dtype = fastest_dtype("cuda" if torch.cuda.is_available() else "cpu")
        kwargs["dtype"] = torch.float32 if dtype is None else dtype
        folder = origin = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(folder):
            origin = Path(folder).resolve().name
        else:
            hub_arguments = ("cache_dir", "force_download", "local_files_only", "revision", "token", "variant")
            folder = cls.download(folder, **{k: kwargs[k] for k in hub_arguments if k in kwargs})
        passed = [name for name in COMPONENTS if name in kwargs]
        index = check_pipeline_folder(folder, kwargs.get("variant"), passed)
        names = inspect.signature(cls).parameters.keys() - set(COMPONENTS)
        settings = {name: value for name, value in {**index, **kwargs}.items() if name in names}
        without_parts: dict[str, Any] = {**settings, **dict.fromkeys(COMPONENTS)}
        try:
            cls(**without_parts)  # an unusable setting is found before any weights are read
            # However this process builds its own networks: weights made in inference mode are multiplied otherwise.
            with torch.device("cpu"), torch.inference_mode(False):
                pipeline = super().from_pretrained(folder, use_safetensors=True, **kwargs)
        except (TypeError, ValueError) as error:
            raise WeightsFileError(f"{Path(folder) / 'model_index.json'} cannot be used: {error}") from error
        for name in ("unet", "segmentation"):
            network = pipeline.components[name]
            if name not in passed and network.dtype == torch.bfloat16 and not torch.cuda.is_available():
                network.to(memory_format=torch.channels_last)
        # diffusers notes the folder of every part and would save it again: a path of this machine in public files.
        for part in [pipeline] + [pipeline.components[name] for name in COMPONENTS if name not in passed]:
            if isinstance(part, ConfigMixin) and "_name_or_path" in part.config:
                part.register_to_config(_name_or_path=origin)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: "DiffusionADPipeline", **kwargs: Any):
        """Another pipeline around the same networks, which stay as they are and take no memory again.

        Args:
            pipeline: whose components and config values are taken.
            kwargs: others in place of some: components, or values such as `noise_seed=1`; and `dtype`, to which both
                pipelines' networks are then converted.
        """
        given = kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or given
        names = inspect.signature(cls).parameters.keys() - set(COMPONENTS)
        values = {name: value for name, value in pipeline.config.items() if name in names}
        new = cls(**{**pipeline.components, **values, **kwargs})
        new._records_cuda_graphs = pipeline._records_cuda_graphs
        if "_name_or_path" in pipeline.config:
            new.register_to_config(_name_or_path=pipeline.config._name_or_path)
        return new if dtype is None else new.to(dtype=dtype)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Download a pipeline from the Hub and return its folder; arguments and errors are those of
        [`loading.download_pipeline`].
        """
        return download_pipeline(pretrained_model_name, **kwargs)

    @classmethod
    def from_single_file(cls, path: str | os.PathLike[str], **kwargs: Any):
        """Load a checkpoint of the authors' code. Nothing in it is run: only tensors and plain settings are read.

        Args:
            path: the `.pt` / `.pth` file.
            kwargs: values for the pipeline's config, such as `score_top_k`, `image_threshold`.

        Raises:
            ValueError: names the file, the cause and the cure.
        """
        checkpoint = read_checkpoint(path)
        unet, segmentation = build_networks(checkpoint, path)
        scheduler = build_scheduler(checkpoint, path)
        return cls(unet, segmentation, scheduler, **{"image_size": unet.config.sample_size, **kwargs})

    def save_single_file(self, path: str | os.PathLike[str]) -> None:
        """Write the authors' checkpoint format, which their code and [`from_single_file`] read.

        Args:
            path: the file to write.

        Raises:
            ValueError: for networks or a prediction type that their code does not have.
        """
        write_checkpoint(path, self.unet, self.segmentation, self.scheduler)


def _as_tuple(output: DiffusionADPipelineOutput) -> tuple[Any, ...]:
    """Every field, also those that are None, which diffusers' own `to_tuple` leaves out."""
    return tuple(getattr(output, field.name) for field in fields(output))
