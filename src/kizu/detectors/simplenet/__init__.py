"""SimpleNet: a small network that tells good features from noisy ones scores patches.

Liu et al., "SimpleNet: A Simple Network for Image Anomaly Detection and Localization", CVPR 2023.

In the order of the paper:

1. §3.1 feature extractor: `networks.SimpleNetGraph.embed`, a backbone's layers and `features.patch_features`
2. §3.2 feature adaptor G: `networks.Projection`
3. §3.3 anomalous feature generator, q⁻ = q + ε: `networks.noise`
4. §3.4 discriminator D: `networks.Discriminator`
5. §3.5 truncated hinge loss and training: `networks.hinge_loss`, `training.Training`
6. §3.6 a patch's score −D(q), and the map: `networks.SimpleNetGraph.score_embeddings`

`detector` puts them together, and `published` reads and writes the files of the published code.

Beyond the paper, and switchable: noise in units of the features' own deviation (`auto_noise`), a share of the patches a
step (`sampled`), and an image score from its most anomalous patches instead of one (`top`). Nothing is ever chosen on
test images.
"""

from kizu.detectors.simplenet.detector import SimpleNet

__all__ = ["SimpleNet"]
