"""How data sets lay out their files: one recogniser each, from a folder to samples.

mvtec     train/good, test/<defect>, ground_truth/<defect>/<stem>_mask.png or <stem>.png; MPDD is the same
loco      mvtec with validation/good, and a folder of masks for each image, one for each region
btad      train/ok, test/ok, test/ko, ground_truth/ko
visa      a table, split_csv/1cls.csv, that gives every image its split, label and mask
ksdd      kos01/Part0.jpg beside kos01/Part0_label.bmp; a black label means good
ksdd2     train/10000.png beside train/10000_GT.png; a black label means good
cifar10   data_batch_1.bin …; each class in turn is the good one
annotated images and what a labelling tool exports: COCO, Label Studio, VIA, CVAT, Lookout for Vision
folder    plain images: good ones alone, or good and bad ones in folders named so
"""

from kizu.data.layouts.annotated import annotated
from kizu.data.layouts.contents import Recogniser
from kizu.data.layouts.plain import named_folders
from kizu.data.layouts.published import cifar10, ksdd, ksdd2, splits, visa

__all__ = ["EXPECTED", "RECOGNISERS"]

EXPECTED = {
    "mvtec": "train/good, test/<defect> and, for masks, ground_truth/<defect>",
    "loco": "train/good, validation/good and test/logical_anomalies or test/structural_anomalies",
    "btad": "train/ok, test/ok and test/ko",
    "visa": "split_csv/1cls.csv",
    "ksdd": "folders kos01, kos02, … with Part0.jpg and Part0_label.bmp",
    "ksdd2": "train and test with 10000.png and 10000_GT.png",
    "cifar10": "data_batch_1.bin, …, test_batch.bin and batches.meta.txt",
    "annotated": "images, and annotations as COCO, Label Studio, VIA, CVAT or Lookout for Vision export them",
    "folder": "images, or folders of images named good and bad",
}

RECOGNISERS: tuple[tuple[tuple[str, ...], Recogniser], ...] = (
    (("visa",), visa),
    (("cifar10",), cifar10),
    (("annotated",), annotated),
    (("ksdd",), ksdd),
    (("ksdd2",), ksdd2),
    (("mvtec", "loco", "btad"), splits),
    (("folder",), named_folders),
)
