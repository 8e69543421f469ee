"""The settings of the synthetic anomalies: a new one is a field here, and what it does beside the others."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from transformers.hf_argparser import HfArg

Foreground = Literal["none", "random", "threshold", "folder", "transformers"]
SHARES = "_probability", "_fraction"  # how the settings end that are shares


@dataclass(frozen=True)
class SynthesisConfig:
    """Where synthetic anomalies lie and what they look like (section III-D of the paper).

    Each field is a key of a run's YAML file and a flag of `diffusionad train` and `diffusionad preview-synthesis`.

    Args:
        texture_dir: folder of textures, flat or nested like DTD's, which the paper uses; None: the shipped CC0 ones;
            `"none"`: none.
        foreground: where anomalies may be. `none`: everywhere; `random`: a random region of each sample, for texture
            categories; `threshold`: the object before a plain background; `folder`: mattes made elsewhere;
            `transformers`: what a segmentation model finds. The paper: mattes of a salient-object model for objects, a
            random region for textures.
        foreground_dir: the mattes for `folder`; None: the authors' DISthresh or thresh beside the folder train.
        foreground_model: the segmentation model for `transformers`, Hub id or folder.
        anomaly_probability: share of the samples with an anomaly, in [0, 1]; the paper: 0.5.
        texture_probability: share of the anomalies that are a texture, in [0, 1]; the others are the picture itself,
            augmented and shuffled. The paper: 0.5 for objects, 1 for textures. 0 where there are no textures at all.
        procedural_probability: share of the textures that `procedural_textures` makes, in [0, 1]; the paper: 0. Where
            `texture_dir` is `"none"`, all textures are made so if it is above 0.
        grayscale_anomalies: whether anomalies on gray pictures are gray. The paper: no; there textures keep their
            colors, and on gray pictures color alone tells every synthetic anomaly, but no real one.
        thin_line_probability: share of the masks that `thin_lines` replaces, in [0, 1]; the paper: 0.
        soft_edge_probability: share of the masks that `soften_edges` blurs, in [0, 1]; the paper: 0.

    Raises:
        ValueError: when a share is not in [0, 1], or a choice is none of those.

    Example:
        >>> from diffusionad_pipe.synthesis.config import SynthesisConfig
        >>> carpets = SynthesisConfig(foreground="random", texture_probability=1.0, soft_edge_probability=0.5)
    """

    texture_dir: str | None = HfArg(
        default=None, help='textures, flat or like DTD; default: the shipped CC0 ones; "none": none'
    )
    foreground: Foreground = HfArg(default="threshold", help="where anomalies may be")
    foreground_dir: str | None = HfArg(
        default=None, help='mattes for "folder"; default: DISthresh or thresh beside the folder train'
    )
    foreground_model: str | None = HfArg(default=None, help='segmentation model for "transformers": Hub id or folder')
    anomaly_probability: float = HfArg(default=0.5, help="share of the samples with an anomaly")
    texture_probability: float = HfArg(
        default=0.5, help="share of anomalies that are textures: 0.5 for objects, 1 for textures"
    )
    procedural_probability: float = HfArg(
        default=0.0, help="share of textures that are made: clouds and plain colors; the paper: 0"
    )
    grayscale_anomalies: bool = HfArg(default=True, help="anomalies on gray pictures are gray; the paper: no")
    thin_line_probability: float = HfArg(
        default=0.0, help="share of anomalies that are thin lines: scratches, cracks; the paper: 0"
    )
    soft_edge_probability: float = HfArg(
        default=0.0, help="share of anomalies with blurred edges: stains, shades; the paper: 0"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), choices_of(type(self), field.name)
            if field.name.endswith(SHARES) and (value is None or not 0 <= value <= 1):
                raise ValueError(f"{field.name} must be a share from 0 to 1, not {value!r}")
            if choices and value not in choices:
                raise ValueError(f"{field.name} must be one of {', '.join(choices)}, not {value!r}")


def choices_of(config: type, name: str) -> tuple[Any, ...]:
    """The values that a setting may have; none where it is no choice."""
    kind = get_type_hints(config)[name]
    return get_args(kind) if get_origin(kind) is Literal else ()
