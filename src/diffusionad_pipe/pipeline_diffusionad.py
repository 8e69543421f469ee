"""DiffusionAD as a diffusers pipeline: a picture in, an anomaly map and a score out, one denoising step between."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import islice
from math import lcm
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .image_processor import DiffusionADImageProcessor, ImageInput
from .loading import LoadedFromFolderMixin
from .pipeline_output import DiffusionADPipelineOutput, join_outputs
from .runtime.acceleration import compile_networks, explained_out_of_memory
from .runtime.config_values import is_finite, is_whole
from .runtime.prefetch import prefetched
from .scheduling_norm_guided_one_step import NormGuidedOneStepScheduler
from .scoring import score_pixels
from .single_file import SingleFileMixin
from .stages import (
    CallArguments,
    DetectedImages,
    PreparedImages,
    StepCallback,
    check_noise,
    join_prepared,
    resolve_arguments,
)
from .tiling import LargeImage, Tiling, detect_in_tiles, prepare_large
from .unet_2d_diffusionad import DiffusionADUNet2DModel
from .unet_2d_segmentation import SegmentationUNet2DModel

logger = logging.get_logger(__name__)


# No picture side above this: a damaged model_index.json must not ask for terabytes.
MAX_SIDE = 8192
TILES_CURE = "a smaller batch_size, fewer noise samples, a smaller tile_size in enable_tiling, or height and width"


class DiffusionADPipeline(LoadedFromFolderMixin, SingleFileMixin):
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

    Example:
        ```python
        from diffusionad_pipe import DiffusionADPipeline, open_image

        pipe = DiffusionADPipeline.from_pretrained("pretrained/hazelnut")
        output = pipe(open_image("photo.jpg"))
        print(output.anomaly_scores[0], output.is_anomalous[0])
        output.anomaly_maps[0].save("map.png")
        ```
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
        self._fixed_noise: tuple[Any, torch.Tensor] | None = None  # the last one, and what it was sampled for

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
        match_input_resolution: bool = True,
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
            match_input_resolution: give maps, masks and reconstructions the size of each picture. False leaves them at
                the size at which the networks worked, or with tiling at that which was cut.
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
        call = self._resolve(
            height=height,
            width=width,
            small_timestep=small_timestep,
            large_timestep=large_timestep,
            guidance_scale=guidance_scale,
            num_noise_samples=num_noise_samples,
            batch_size=batch_size,
            output_type=output_type,
            match_input_resolution=match_input_resolution,
            callback_on_step_end=callback_on_step_end,
        )

        # 1. Pictures of any kind and size become batches as the networks take them.
        images = self.image_processor.split(image)
        check_noise(noise, generator, len(images), call, self.tiling is not None)
        batches = self._prepare(images, call)

        # 2. Reconstruct and compare, batch by batch. A generator draws picture by picture, so that the batch size plays
        #    no part.
        generators = iter(generator if isinstance(generator, list) else [generator] * len(images))
        outputs, done = [], 0
        for batch in batches if len(batches) == 1 else self.progress_bar(batches):
            own_noise = None if noise is None else noise[:, done : done + len(batch.sizes)]
            detected = self._detect(batch, call, list(islice(generators, len(batch.sizes))), own_noise)

            # 3. Scores, decisions, and everything at the size and in the kind that the caller wants.
            outputs.append(self.to_output(detected, output_type, call.match_input_resolution, first=done))
            done += len(batch.sizes)
        self.maybe_free_model_hooks()
        output = join_outputs(outputs, output_type)
        return output if return_dict else tuple(getattr(output, field.name) for field in fields(output))

    def stream(
        self,
        images: Iterable[ImageInput | Exception],
        *,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_exceptions: bool = False,
        **arguments: Any,
    ) -> Iterator[Any]:
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
            return_exceptions: a picture that cannot be used, or for which the networks give NaN, has its error in the
                place of its output, and the rest goes on. So has an error that `images` yields in the place of a
                picture that could not be read: it counts as a picture of its batch. Like `asyncio.gather`.
            arguments: further ones of `__call__`, but `noise`, and `generator` as one for all.

        Yields:
            [`DiffusionADPipelineOutput`] of one picture, B = 1, in the order of `images`.

        Raises:
            ValueError: as `__call__` does, and whatever `images` raises, after the outputs of all batches before.
        """
        if arguments.pop("noise", None) is not None or isinstance(arguments.get("generator"), list):
            raise ValueError("the number of pictures in a stream is not known: give one generator for all, or none")
        if "return_dict" in arguments:
            raise ValueError("a stream yields outputs, not tuples: leave return_dict out")
        generator = arguments.pop("generator", None)
        call = self._resolve(batch_size=batch_size, output_type=output_type, **arguments)
        check_noise(None, generator, 1, call, self.tiling is not None)
        overlapped = self._execution_device.type != "cpu"
        return self._stream(images, call, generator, return_exceptions, overlapped)

    def _stream(
        self,
        images: Iterable[ImageInput | Exception],
        call: CallArguments,
        generator: torch.Generator | None,
        return_exceptions: bool,
        overlapped: bool,
    ) -> Iterator[Any]:
        ahead: Callable[[Iterable[Any]], Iterator[Any]] = prefetched if overlapped else iter
        # CUDA graphs belong to the thread that recorded them; another would record them again.
        detect_ahead = iter if self._records_cuda_graphs else ahead
        kept: tuple[type[Exception], ...] = (TypeError, ValueError) if return_exceptions else ()
        together = 1 if self.tiling is not None else call.batch_size

        def prepare() -> Iterator[tuple[list[Exception | None], PreparedImages | LargeImage | None]]:
            remaining = iter(images) if overlapped else prefetched(images, together)
            while items := list(islice(remaining, together)):
                prepared = self._prepare_each(items, call, kept)
                del items  # pictures of full size need not wait for the networks
                yield prepared

        def detect() -> Iterator[tuple[list[Exception | None], DetectedImages | None]]:
            for errors, batch in ahead(prepare()):
                yield errors, None if batch is None else self._detect(batch, call, [generator] * len(batch.sizes))

        for errors, detected in detect_ahead(detect()):
            singles = iter(() if detected is None else detected.split())
            for error in errors:
                output: DiffusionADPipelineOutput | Exception
                try:
                    output = error or self.to_output(next(singles), call.output_type, call.match_input_resolution)
                except kept as caught:
                    output = caught
                yield output
        self.maybe_free_model_hooks()

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
        """The noise that is used without a generator, a function of the size and `noise_seed` alone: sampled on the CPU
        whatever the device, once for many calls.

        Returns:
            `[num_noise_samples, 2, 1, 3, height, width]` on the pipeline's device, small scale first.
        """
        shape, seed = (num_noise_samples, 2, 3, height, width), self.config.noise_seed
        wanted = (shape, seed, self._execution_device)
        known = self._fixed_noise  # read once: another thread may replace it meanwhile
        if known is None or known[0] != wanted:
            generator = torch.Generator("cpu").manual_seed(seed)
            sampled = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            known = self._fixed_noise = (wanted, sampled[:, :, None].to(self._execution_device))
        return known[1]

    def to_output(
        self, detected: DetectedImages, output_type: str, match_input_resolution: bool = True, first: int = 0
    ) -> DiffusionADPipelineOutput:
        """Scores, decisions, and everything at the wanted size and in the caller's kind.

        Args:
            detected: maps and reconstructions of B pictures, on the CPU.
            output_type: `"pil"`, `"np"` or `"pt"`.
            match_input_resolution: as `__call__` takes it.
            first: the number of the first picture, for the error.

        Raises:
            ValueError: where the networks gave NaN, which is above no threshold: the picture would pass as good.
        """
        # 1. Score at the size of the maps (paper, section IV-A): the mean of the largest pixels.
        maps, reconstructions, sizes, score_area = detected
        pixels = score_pixels(self.config.score_top_k, maps[0].numel(), score_area)
        scores = maps.flatten(1).topk(pixels).values.mean(1)  # [B]
        if not scores.isfinite().all():
            index = first + int(scores.isfinite().int().argmin())
            raise ValueError(
                f"the networks gave NaN for picture {index}: their weights, the noise or guidance_scale hold NaN, or "
                "float16 overflowed; use others, or dtype=torch.bfloat16"
            )

        # 2. Decisions, where thresholds are set; on pixels at the size of the results.
        if not match_input_resolution:
            sizes = [(maps.shape[-2], maps.shape[-1])] * len(maps)
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

    def _prepare(self, images: Sequence[ImageInput], call: CallArguments) -> list[PreparedImages | LargeImage]:
        """Batches of pictures as the networks take them; with tiling each picture is one of its own."""
        processor, batches = self.image_processor, list[PreparedImages | LargeImage]()
        if self.tiling is None:
            pixels, sizes = processor.preprocess(images, *self._networks_size(call))
            for start in range(0, len(images), call.batch_size):
                items = slice(start, start + call.batch_size)
                batches.append(PreparedImages(pixels[items], sizes[items]))
            return batches
        for index, image in enumerate(images):
            with processor.named(index, len(images)):
                large = prepare_large(processor, image, self.tiling, call.height, call.width, self.round_size)
                # A picture no larger than a tile is treated as without tiling.
                batches.append(large or PreparedImages(*processor.preprocess(image, *self._networks_size(call))))
        return batches

    def _prepare_each(
        self, items: Sequence[Any], call: CallArguments, kept: tuple[type[Exception], ...]
    ) -> tuple[list[Exception | None], PreparedImages | LargeImage | None]:
        """The error of each picture, where it is one of the `kept` kinds, and one batch of those without."""
        errors: list[Exception | None] = []
        batches: list[PreparedImages | LargeImage] = []
        for item in items:
            try:
                if isinstance(item, kept):
                    raise item
                batches += self._prepare([item], call)
                errors.append(None)
            except kept as error:
                errors.append(error)
        return errors, join_prepared(batches) if batches else None

    def _detect(
        self,
        batch: PreparedImages | LargeImage,
        call: CallArguments,
        generators: Sequence[torch.Generator | None],
        noise: torch.Tensor | None = None,
    ) -> DetectedImages:
        """Maps and reconstructions of a batch, on the CPU."""
        device = self._execution_device
        timesteps = torch.tensor([call.small_timestep, call.large_timestep], dtype=torch.int64, device=device)

        def detect(images: torch.Tensor, noises: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.inference_mode():
                return self.detect(images.to(device), noises, timesteps, call.guidance_scale, call.callback_on_step_end)

        if isinstance(batch, LargeImage):
            assert self.tiling is not None
            (height, width), settings = batch.sizes[0], f"num_noise_samples={call.num_noise_samples}"
            used = f"{settings}, batch_size={call.batch_size} and tile_size={self.tiling.tile_size}"
            with explained_out_of_memory(f"{used} for a picture of {height} x {width} pixels", TILES_CURE):
                noises = self._noise(call, generators, *batch.tile)
                maps, reconstructions = detect_in_tiles(
                    batch, self.tiling.overlap, noises, detect, call.batch_size, self.image_processor, self.progress_bar
                )
            return DetectedImages(maps, reconstructions, batch.sizes, batch.tile[0] * batch.tile[1])
        height, width = batch.pixels.shape[-2:]
        at_size = f"at {height} x {width} pixels"
        with explained_out_of_memory(f"num_noise_samples={call.num_noise_samples} {at_size}", "fewer noise samples"):
            noises = self._noise(call, generators, height, width) if noise is None else noise[None]
        with explained_out_of_memory(f"batch_size={call.batch_size} {at_size}", "a smaller batch_size"):
            noises = noises.expand(-1, -1, len(batch.pixels), -1, -1, -1)
            maps, reconstructions = detect(batch.pixels, noises)
            return DetectedImages(maps.cpu(), reconstructions.cpu(), batch.sizes)

    def _noise(
        self, call: CallArguments, generators: Sequence[torch.Generator | None], height: int, width: int
    ) -> torch.Tensor:
        """`[K, 2, B, 3, height, width]`: each picture's from its generator, or with B = 1 the fixed one for all."""
        if generators[0] is None:
            return self.fixed_noise(call.num_noise_samples, height, width)
        shape, device = (call.num_noise_samples, 2, 3, height, width), self._execution_device
        sampled = [randn_tensor(shape, generator=g, device=device, dtype=torch.float32) for g in generators]
        return torch.stack(sampled, dim=2)

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

    def _resolve(self, **arguments: Any) -> CallArguments:
        call = resolve_arguments(self.scheduler, **arguments)
        if self.tiling is None:
            height, width = self._networks_size(call)
            call = call._replace(height=height, width=width)
        return call

    def _networks_size(self, call: CallArguments) -> tuple[int, int]:
        side = self.config.image_size
        return (
            self.round_size(side if call.height is None else call.height, "height"),
            self.round_size(side if call.width is None else call.width, "width"),
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
