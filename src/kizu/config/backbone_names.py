"""What the published codes call a backbone, and what timm calls the same network with the same weights."""

from collections.abc import Sequence

from kizu.errors import OptionError

__all__ = ["in_timm", "joined", "published", "without_seed"]

SEED = ".seed-"
TIMM = {
    "resnet18": "resnet18.tv_in1k",
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "resnext101": "resnext101_32x8d.tv_in1k",
    "wideresnet50": "wide_resnet50_2.tv_in1k",
    "wideresnet101": "wide_resnet101_2.tv_in1k",
    "vgg11": "vgg11.tv_in1k",
    "vgg19": "vgg19.tv_in1k",
    "vgg19_bn": "vgg19_bn.tv_in1k",
    "resnet200": "resnet200",
    "resnest50": "resnest50d_4s2x40d",
    "resnetv2_50_bit": "resnetv2_50x3_bit.goog_in21k_ft_in1k",
    "resnetv2_50_21k": "resnetv2_50x3_bit.goog_in21k",
    "resnetv2_101_bit": "resnetv2_101x3_bit.goog_in21k_ft_in1k",
    "resnetv2_101_21k": "resnetv2_101x3_bit.goog_in21k",
    "resnetv2_152_bit": "resnetv2_152x4_bit.goog_in21k_ft_in1k",
    "resnetv2_152_21k": "resnetv2_152x4_bit.goog_in21k",
    "resnetv2_152_384": "resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k_384",
    "resnetv2_101": "resnetv2_101",
    "mnasnet_100": "mnasnet_100",
    "mnasnet_a1": "semnasnet_100",
    "mnasnet_b1": "mnasnet_100",
    "densenet121": "densenet121.tv_in1k",
    "densenet201": "densenet201.tv_in1k",
    "inception_v4": "inception_v4",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_r50": "vit_large_r50_s32_224",
    "vit_deit_base": "deit_base_patch16_224",
    "vit_deit_distilled": "deit_base_distilled_patch16_224",
    "vit_swin_base": "swin_base_patch4_window7_224",
    "vit_swin_large": "swin_large_patch4_window7_224",
    "efficientnet_b7": "tf_efficientnet_b7",
    "efficientnet_b5": "tf_efficientnet_b5",
    "efficientnet_b3": "tf_efficientnet_b3",
    "efficientnet_b1": "tf_efficientnet_b1",
    "efficientnetv2_m": "tf_efficientnetv2_m",
    "efficientnetv2_l": "tf_efficientnetv2_l",
    "efficientnet_b3a": "efficientnet_b3",
    "ref_wideresnet50": "wide_resnet50_2.tv_in1k",
    "cait_s24_224": "cait_s24_224",
    "cait_xs24": "cait_xs24_384",
}
UNKNOWN = ("alexnet", "bninception", "mc3_resnet50")  # timm has no such network


def in_timm(name: str) -> str:
    """timm's name for a published one; any other is returned as it is. Raises `OptionError` where timm has none."""
    if name in UNKNOWN:
        raise OptionError(f"-b {name}: timm has no such network; kizu knows {', '.join(TIMM)} and all of timm's names")
    return TIMM.get(name, name)


def published(name: str) -> str:
    """The published name of a network, where it has one."""
    return next((ours for ours, timms in TIMM.items() if timms == name), name)


def joined(given: Sequence[str]) -> str:
    """Published names, some with seeds → our option: timm's names with these seeds, separated by commas."""
    parts = [without_seed(name) for name in given]
    return ",".join(in_timm(name) + ("" if seed is None else f"{SEED}{seed}") for name, seed in parts)


def without_seed(name: str) -> tuple[str, int | None]:
    """wideresnet50.seed-3 → ("wideresnet50", 3): a member of an ensemble with a seed of its own."""
    before, found, number = name.partition(SEED)
    if not found:
        return name, None
    if not number.isdigit():
        raise OptionError(f"-b {name}: what follows .seed- should be a number")
    return before, int(number)
