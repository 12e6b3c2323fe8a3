"""The settings of PUAD, which has those of its base inside."""

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from kizu.config.base import Config, build
from kizu.config.efficientad import EfficientADConfig
from kizu.config.patchcore import PatchCoreConfig
from kizu.config.simplenet import SimpleNetConfig

__all__ = ["PUADConfig"]

BASES: dict[str, type[Config]] = {
    "patchcore": PatchCoreConfig,
    "simplenet": SimpleNetConfig,
    "efficientad": EfficientADConfig,
}


class PUADConfig(Config):
    """PUAD (Sugawara & Imamura, ICIP 2024).

    Its size and smoothing are those of its base, unless they are given.
    """

    base: Literal["patchcore", "simplenet", "efficientad"] = Field(
        "patchcore", description="Method that gives the anomaly map and the structural score."
    )
    base_settings: dict[str, Any] = Field(
        {}, description="Settings of the base: coreset=0.05,layers=layer2,layer3, or JSON."
    )
    balance: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of the global score. 0: only the structural score. 1: only the global score.",
    )
    gate: bool = Field(
        True, description="Count the global score in full only above a level that good images hardly ever reach."
    )
    feature: Literal["mean", "token", "both"] = Field(
        "mean", description="Global feature: the means of the layers, the class tokens of a transformer, or both."
    )
    feature_extractor: Literal["student", "teacher"] = Field(
        "student", description='With `base="efficientad"`: the network whose features are the global feature.'
    )
    exact: bool = Field(
        False, description="The published arithmetic: both scores are standardised and added, without a gate."
    )

    @model_validator(mode="before")
    @classmethod
    def _complete_from_base(cls, values: dict[str, Any]) -> dict[str, Any]:
        kind = BASES.get(values.get("base", "patchcore"))
        if kind is None:
            return values
        own = _settings(values.get("base_settings") or {})
        values = {**values, **{name: own.pop(name) for name in list(own) if name in Config.model_fields}}
        base = build(kind, own)
        for name, field in Config.model_fields.items():
            if getattr(base, name) != field.default:
                values.setdefault(name, getattr(base, name))
        plain = base.model_dump(mode="json")
        return {**values, "base_settings": {name: plain[name] for name in own}}

    @model_validator(mode="after")
    def _settings_fit(self) -> "PUADConfig":
        build(BASES[self.base], self._for_base)
        if self.rules_sizes:
            raise ValueError(
                "PUAD scores a photograph as a whole, and `min_area`, `min_length` and `max_count` are of marked "
                f"regions: use {self.base}"
            )
        if self.tile is not None:
            raise ValueError(
                "`tile`: PUAD judges the photograph as a whole; choose PatchCore, SimpleNet or EfficientAD"
            )
        if self.exact and self.balance != 0.5:
            raise ValueError("`exact=True` adds both scores with equal weight: it goes with no `balance`")
        return self

    @property
    def _for_base(self) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in Config.model_fields if name in self.model_fields_set}
        return {**given, **self.base_settings}

    @property
    def base_config(self) -> Config:
        """The settings of the base."""
        return build(BASES[self.base], self._for_base)

    @property
    def whole(self) -> str:
        """What stands for the whole image: "mean", "token", "both", "student" or "teacher"."""
        return self.feature_extractor if self.base == "efficientad" else self.feature


def _settings(value: Any) -> dict[str, Any]:
    """Settings from a dictionary, JSON, or "size=320,layers=layer2,layer3", where layer3 belongs to layers."""
    if isinstance(value, dict):
        return dict(value)
    if str(value).lstrip().startswith("{"):
        try:
            return dict(json.loads(value))
        except ValueError:
            raise ValueError(f'`base_settings="{value}"`: this is not JSON') from None
    settings: dict[str, Any] = {}
    for part in str(value).split(","):
        before, equals, after = part.partition("=")
        if equals:
            name = before.strip().replace("-", "_")
            settings[name] = after.strip()
        elif settings:
            settings[name] += f",{part.strip()}"
        else:
            raise ValueError(f'`base_settings="{value}"`: write name=value,name=value or JSON')
    return settings
