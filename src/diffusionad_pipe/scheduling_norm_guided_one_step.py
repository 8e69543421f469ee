"""Norm-guided one-step denoising: the mathematics of DiffusionAD (arXiv 2303.08730, section III-C).

A diffusers scheduler in the usual form (config, `add_noise`, `step`), except that one `step` takes the network's
predictions for both noise scales and returns the finished reconstruction. It keeps no state between two calls.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar
from diffusers.utils import BaseOutput

from .runtime.config_values import is_finite, is_whole


@dataclass
class NormGuidedOneStepSchedulerOutput(BaseOutput):
    """Output of [`NormGuidedOneStepScheduler.step`]. All are `[B, C, H, W]`; a distilled network has no large scale.

    Args:
        prev_sample: the norm-guided reconstruction x̂0_g, clamped when `clip_sample` is set.
        pred_small: the one-step prediction x̂0_s from the small noise scale, not clamped.
        pred_large: the "norm image" n: the one-step prediction from the large scale, clamped when `clip_sample`;
            or None.
        noised_small: the pictures at the small noise scale x_s, as they were given.
        noised_large: the pictures at the large noise scale x_b, as they were given; or None.
    """

    prev_sample: torch.Tensor
    pred_small: torch.Tensor
    pred_large: torch.Tensor | None
    noised_small: torch.Tensor
    noised_large: torch.Tensor | None


class NormGuidedOneStepScheduler(SchedulerMixin, ConfigMixin):
    """Noises pictures at two scales and joins the two one-step predictions by norm guidance.

    The large scale hides a defect wholly, so its prediction is free of it but coarse; the small scale keeps the
    details of the picture but may keep the defect too. The large prediction guides the small one.

    Args:
        num_train_timesteps: length T of the noise schedule.
        beta_start: first beta.
        beta_end: last beta.
        beta_schedule: `"linear"`, `"scaled_linear"` or `"squaredcos_cap_v2"`.
        trained_betas: `[T]`, in place of the three above.
        prediction_type: what the network predicts: the noise (`"epsilon"`, the paper), the clean picture
            (`"sample"`, ours for small models) or the velocity (`"v_prediction"`).
        small_timestep: t_s, the default small noise scale.
        large_timestep: t_b, the default large noise scale.
        guidance_scale: w, the weight of the norm guidance; 0 leaves the small scale alone.
        clip_sample: clamp the norm image and the result to ±`clip_sample_range`, as the paper does.
        clip_sample_range: half width of that range.
        distilled: the network was taught by another (`training/train.py --distill`): from the small scale alone it
            predicts the norm-guided reconstruction, with the scales and the weight above built in. Not in the paper.

    Raises:
        ValueError: for an unknown `beta_schedule` or `prediction_type`, and for values outside their ranges.

    Example:
        >>> import torch
        >>> from diffusionad_pipe import NormGuidedOneStepScheduler
        >>> scheduler = NormGuidedOneStepScheduler()
        >>> images, noise = torch.rand(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
        >>> timesteps = torch.tensor([200, 200, 400, 400])  # the small scale of both pictures, then the large one
        >>> noised = scheduler.add_noise(torch.cat([images, images]), torch.cat([noise, noise]), timesteps)
        >>> prediction = torch.cat([noise, noise])  # in place of a UNet's, that of a perfect one
        >>> output = scheduler.step(prediction, timesteps, noised)
        >>> torch.allclose(output.prev_sample, images, atol=1e-4)
        True
    """

    _compatibles = ["DDPMScheduler", "DDIMScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        small_timestep: int = 200,
        large_timestep: int = 400,
        guidance_scale: float = 1.0,
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        distilled: bool = False,
    ):
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, not {prediction_type!r}")
        if not is_whole(num_train_timesteps) or not 2 <= num_train_timesteps <= 1_000_000:
            raise ValueError(f"num_train_timesteps={num_train_timesteps!r} is outside 2 ... 1000000")
        if not (is_whole(small_timestep) and is_whole(large_timestep)) or not (
            0 <= small_timestep < large_timestep < num_train_timesteps
        ):
            raise ValueError(
                f"small_timestep={small_timestep!r} and large_timestep={large_timestep!r} must be whole numbers in "
                f"order, 0 <= small < large <= {num_train_timesteps - 1}"
            )
        for name, value in (("clip_sample", clip_sample), ("distilled", distilled)):
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} must be true or false")
        if not is_finite(guidance_scale) or not is_finite(clip_sample_range) or clip_sample_range <= 0:
            raise ValueError(
                f"guidance_scale={guidance_scale!r} and clip_sample_range={clip_sample_range!r} must be finite, the "
                "range above 0"
            )
        # In float64, as the authors do: a float32 product of a thousand factors is off by 1e-6. On the CPU, also where
        # networks are built on another default device: the betas are looked at below.
        if trained_betas is not None:
            betas = torch.as_tensor(np.asarray(trained_betas), dtype=torch.float64, device="cpu")
        elif beta_schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64, device="cpu")
        elif beta_schedule == "scaled_linear":
            roots = beta_start**0.5, beta_end**0.5
            betas = torch.linspace(*roots, num_train_timesteps, dtype=torch.float64, device="cpu") ** 2
        elif beta_schedule == "squaredcos_cap_v2":
            with torch.device("cpu"):
                betas = betas_for_alpha_bar(num_train_timesteps).double()
        else:
            raise ValueError(f"beta_schedule must be linear, scaled_linear or squaredcos_cap_v2, not {beta_schedule!r}")
        if betas.shape != (num_train_timesteps,) or not ((betas >= 0) & (betas < 1)).all():  # NaN is neither
            raise ValueError(f"the betas must be {num_train_timesteps} numbers in [0, 1)")
        self.betas = betas.float()
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0).float()  # ᾱ, [T]

        self.init_noise_sigma = 1.0
        self.timesteps = torch.tensor([small_timestep, large_timestep], dtype=torch.int64, device="cpu")

    @property
    def num_scales(self) -> int:
        """How many noise scales the network sees of each picture: 2, and 1 when it is distilled."""
        return 1 if self.config.distilled else 2

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """Move `timesteps`, the default pair (small, large), to a device. The pair never changes: one step is all.

        Args:
            num_inference_steps: accepted because every diffusers scheduler has it; ignored.
            device: where `timesteps` shall be; None is the CPU.
        """
        pair = [self.config.small_timestep, self.config.large_timestep]
        self.timesteps = torch.tensor(pair, dtype=torch.int64, device=device or "cpu")

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | int | None = None) -> torch.Tensor:
        """Return the sample unchanged: this family of schedulers does not scale the network's input."""
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Noise pictures: x_t = √ᾱ_t · x0 + √(1−ᾱ_t) · ε (paper, equation 1).

        Args:
            original_samples: pictures x0 `[B, C, H, W]`, in [0, 1] for this method.
            noise: Gaussian noise ε of the same shape.
            timesteps: `[B]`, or `[1]` for all.

        Returns:
            Noised pictures `[B, C, H, W]`.
        """
        signal, sigma = self._signal_and_noise(timesteps, original_samples)
        return signal * original_samples + sigma * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The training target of `prediction_type="v_prediction"`: v = √ᾱ_t · ε − √(1−ᾱ_t) · x0. Same shapes as
        [`add_noise`]."""
        signal, sigma = self._signal_and_noise(timesteps, sample)
        return signal * noise - sigma * sample

    def predict_original_sample(
        self, model_output: torch.Tensor, timesteps: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """The one-step prediction x̂0 of the clean picture, not clamped (paper, equation 6).

        Args:
            model_output: what the network predicts, `[B, C, H, W]`.
            timesteps: `[B]`, or `[1]` for all.
            sample: the noised pictures x_t `[B, C, H, W]`.

        Returns:
            x̂0 `[B, C, H, W]`.
        """
        signal, sigma = self._signal_and_noise(timesteps, sample)
        if self.config.prediction_type == "epsilon":
            return (sample - sigma * model_output) / signal
        if self.config.prediction_type == "v_prediction":
            return signal * sample - sigma * model_output
        return model_output

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        guidance_scale: float | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Join the predictions for both noise scales into one reconstruction.

        Args:
            model_output: the network's output for both scales, `[2B, C, H, W]`, the small scale's B pictures first;
                `[B, C, H, W]` when distilled.
            timestep: `[2]` (small, large), or `[2B]`, one for each picture and scale; `[1]` or `[B]` when distilled.
            sample: the noised pictures that the network saw, of the shape of `model_output`.
            guidance_scale: w; None takes the config's.
            return_dict: False returns a tuple in the order of the output's fields.

        Returns:
            [`NormGuidedOneStepSchedulerOutput`].

        Raises:
            ValueError: when the batch does not hold the network's scales.
        """
        scales = self.num_scales
        if sample.shape[0] % scales or model_output.shape != sample.shape:
            wanted = "both scales in one batch, [2B, C, H, W]" if scales == 2 else "the small scale alone, [B, C, H, W]"
            raise ValueError(
                f"step needs {wanted}: got model_output {tuple(model_output.shape)} and sample {tuple(sample.shape)}"
            )
        if timestep.numel() not in (scales, sample.shape[0]):
            raise ValueError(
                f"step needs {scales} or {sample.shape[0]} timesteps, small scale first, not {timestep.numel()}"
            )
        if self.config.distilled:  # the network has learned what is below
            prediction = self.predict_original_sample(model_output, timestep, sample)
            distilled = (self._clip(prediction), prediction, None, sample, None)
            return NormGuidedOneStepSchedulerOutput(*distilled) if return_dict else distilled
        weight = self.config.guidance_scale if guidance_scale is None else guidance_scale

        # | here           | paper | shape          |                                       |
        # | t_small        | t_s   | [1] or [B]     | small noise scale                     |
        # | t_large        | t_b   | [1] or [B]     | large noise scale                     |
        # | noised_small   | x_s   | [B, C, H, W]   | picture at the small scale            |
        # | noised_large   | x_b   | [B, C, H, W]   | picture at the large scale            |
        # | pred_small     | x̂0_s  | [B, C, H, W]   | one-step prediction from x_s          |
        # | pred_large     | n     | [B, C, H, W]   | "norm image", prediction from x_b     |
        # | weight         | w     | number         | guidance weight                       |
        t_small, t_large = timestep.reshape(2, -1)
        noised_small, noised_large = sample.unflatten(0, (2, -1))
        output_small, output_large = model_output.unflatten(0, (2, -1))

        # 1. Predict the clean picture from each scale in one step.
        pred_small = self.predict_original_sample(output_small, t_small, noised_small)
        pred_large = self._clip(self.predict_original_sample(output_large, t_large, noised_large))

        # 2. Guide the small scale by the norm image. The paper writes it on the noise, with n noised again to t_s by
        #    the network's own ε_s (n_s):  ε̂ = ε_s − w·√(1−ᾱ_s)·(n_s − x_s). Put into x̂0(x_s, ε̂), everything but
        #    this cancels, for every prediction type:  x̂0_g = x̂0_s + w·(1−ᾱ_s)·(n − x̂0_s)
        _, sigma_small = self._signal_and_noise(t_small, noised_small)
        guided = self._clip(pred_small + weight * sigma_small**2 * (pred_large - pred_small))

        output = (guided, pred_small, pred_large, noised_small, noised_large)
        return NormGuidedOneStepSchedulerOutput(*output) if return_dict else output

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def _signal_and_noise(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """√ᾱ_t and √(1−ᾱ_t) as `[B or 1, 1, 1, 1]` on the device and in the dtype of `like`."""
        if self.alphas_cumprod.device != like.device:  # it stays there: one copy to a GPU, not one for each call
            self.alphas_cumprod = self.alphas_cumprod.to(like.device)
        alpha_bar = self.alphas_cumprod[timesteps.to(like.device)].reshape(-1, 1, 1, 1)
        return alpha_bar.sqrt().to(like.dtype), (1 - alpha_bar).sqrt().to(like.dtype)

    def _clip(self, sample: torch.Tensor) -> torch.Tensor:
        if not self.config.clip_sample:
            return sample
        return sample.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
