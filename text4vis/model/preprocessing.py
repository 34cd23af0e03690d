"""What a CLIP's weights were trained with: mean and deviation of the pixels, resize, interpolation, activation.

A wrong one makes no error and worse figures, so nothing is assumed. In this order: what the recipe gives; what the
model's own configuration or its tag says; what all weights agree on that open_clip knows of the architecture (with
this activation); else the key must be given. Random weights were trained with nothing and take CLIP's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from open_clip.transform import PreprocessCfg

from text4vis.config.contradictions import check
from text4vis.config.schema import Config, ConfigError, NetworkConfig
from text4vis.model.sources import Source, find_source

logger = logging.getLogger("text4vis")

# Keys of the recipe, and what open_clip calls them.
PIXELS = {
    "network.mean": "mean",
    "network.std": "std",
    "data.resize": "resize_mode",
    "data.interpolation": "interpolation",
}
ACTIVATION = "network.activation"
KEYS = (*PIXELS, ACTIVATION)
DATA_KEYS = ("data.resize", "data.interpolation")
_CLIPS = PreprocessCfg()


@dataclass(frozen=True)
class Known:
    """A value and where it is known from; None where nothing tells it."""

    value: Any
    origin: str


def settle(
    config: Config,
    recorded: Config | None = None,
    *,
    network: NetworkConfig | None = None,
    keys: Iterable[str] = KEYS,
    say: Callable[[str], None] = logger.info,
) -> Config:
    """The configuration with each of the keys given, as the model needs it.

    recorded: the configuration of the trained model that is opened or goes on, whose values come before the model's
    own. Where an earlier version did not record them, what nothing tells is done as it did: CLIP's pixels, the
    activation of the configuration, frames scaled and cropped in CLIP's way. network: of the model's own files, where
    it is not that of `config`. say: is told what was settled and from where. Raises ConfigError that names the keys to
    give.
    """
    keys = list(keys)
    settled = {key: Known(value, "given") for key in keys if (value := _read(config, key)) is not None}
    if recorded is not None:
        values = {key: _read(recorded, key) for key in keys if key not in settled}
        settled |= {key: Known(value, "as it was trained") for key, value in values.items() if value is not None}
    what = config.network.arch
    if len(settled) < len(keys):
        source = find_source(network or config.network)
        what = source.what
        former = recorded is not None and recorded.network.activation is None
        settled |= _from_source(source, keys, settled, assume=former or not config.network.init)
    say(f"{what}: {_in_words(settled)}")
    return check(_with(config, settled), {}, what)


def _from_source(
    source: Source, keys: Iterable[str], settled: Mapping[str, Known], *, assume: bool
) -> dict[str, Known]:
    """What the source tells of the keys that are not settled. Raises ConfigError where it does not, unless `assume`."""
    activation = settled.get(ACTIVATION) or _activation(source, assume=assume)
    found = {ACTIVATION: activation}
    if source.tags:  # which of them tell the pixels depends on it
        _require(source, found)
    for key in PIXELS:
        found[key] = _pixels(source, key, activation.value == "quick_gelu", assume=assume)
    found = {key: known for key, known in found.items() if key in keys and key not in settled}
    _require(source, found)
    return found


def network_of(network: NetworkConfig, source: Source) -> NetworkConfig:
    """The network with mean, deviation and activation given. Raises ConfigError that names the keys to give."""
    config = replace(Config(), network=network)  # type: ignore[type-var]
    keys = [key for key in KEYS if key.startswith("network.")]
    settled = {key: Known(value, "given") for key in keys if (value := _read(config, key)) is not None}
    settled |= _from_source(source, keys, settled, assume=not network.init)
    return _with(config, settled).network


def _activation(source: Source, *, assume: bool) -> Known:
    quick_gelu = bool(source.config.get("quick_gelu")) if assume else source.quick_gelu
    if quick_gelu is None:
        return Known(None, "the tensors do not show it, and published weights have either")
    return Known("quick_gelu" if quick_gelu else "gelu", "its own")


def _pixels(source: Source, key: str, quick_gelu: bool, *, assume: bool) -> Known:
    name = PIXELS[key]
    if source.preprocess is not None:
        return Known(_plain(source.preprocess[name]), "its own")
    if assume:
        return Known(_plain(getattr(_CLIPS, name)), "CLIP's")
    values: dict[str, Any] = {}
    for tag, known in source.tags.items():
        if bool(known.get("quick_gelu")) == quick_gelu and known.get(name) is not None:
            values[tag] = _plain(known[name])
    if len(set(values.values())) == 1:
        return Known(next(iter(values.values())), "that of all published weights of its architecture")
    if values:
        return Known(None, f"published weights differ ({_some(f'{tag}: {value}' for tag, value in values.items())})")
    return Known(None, "open_clip knows no published weights of this architecture")


def _plain(value: Any) -> Any:
    """A value of open_clip's as the key takes it: it may give one number for all colours, and random means bicubic."""
    if isinstance(value, str):
        return "bicubic" if value == "random" else value
    numbers = value if isinstance(value, list | tuple) else [value] * 3
    return tuple(float(number) for number in numbers)


def _require(source: Source, settled: Mapping[str, Known]) -> None:
    """Raises ConfigError that names all keys without a value."""
    lines = [f"{key}: {known.origin}" for key, known in settled.items() if known.value is None]
    if lines:
        keys = ", ".join(key for key, known in settled.items() if known.value is None)
        raise ConfigError(
            f"{'; '.join(lines)}. {source.what} does not say what its weights were trained with, and a guess would "
            f"spoil the figures without a word: give {keys} as their publisher states (CLIP's by OpenAI: "
            f"{list(_CLIPS.mean)}, {list(_CLIPS.std)}, shortest, bicubic, quick_gelu)"
        )


def _in_words(settled: Mapping[str, Known]) -> str:
    origins: dict[str, list[str]] = {}
    for key in (key for key in KEYS if key in settled):
        value = settled[key].value
        origins.setdefault(settled[key].origin, []).append(
            f"{key} {list(value) if isinstance(value, tuple) else value}"
        )
    return "; ".join(f"{', '.join(values)} ({origin})" for origin, values in origins.items())


def _some(names: Iterable[str], most: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none known"


def _read(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _with(config: Config, settled: Mapping[str, Known]) -> Config:
    for key, known in settled.items():
        section, _, name = key.partition(".")
        changed = replace(getattr(config, section), **{name: known.value})
        config = replace(config, **{section: changed})  # type: ignore[type-var]
    return config
