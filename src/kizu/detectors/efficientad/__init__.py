"""EfficientAD: a student learns on good parts to answer as its teacher does; where it fails to, there is an anomaly.

Batzner et al., "EfficientAD: Accurate Visual Anomaly Detection at Millisecond-Level Latencies", WACV 2024.

In the order of the paper:

1. §3.1 patch description networks, and the teacher distilled from a large network: `networks.PDN`, `distillation`,
   `teacher` (its files)
2. §3.2 student, hard feature loss and penalty: `graph.hard_loss`, `graph.EfficientADGraph.losses`, `training.train`
3. §3.3 autoencoder, which sees the whole part at once: where the student disagrees with it, things that are right by
   themselves are together wrong: `networks.Autoencoder`
4. §3.4 both maps in units of quantiles of good pixels, their mean, and its maximum: `detector.EfficientAD` measures
   the quantiles, `graph.EfficientADGraph.score_outputs` uses them

`embedded` is the default: a pretrained network in the teacher's place, which is quick on a CPU. `network=s` and
`network=m` are the paper's.

Different from the published code, and switchable: photographs get a frame in the mean colour of good ones' borders
(`border`), so that the map reaches to the edge and lies where the defect is.
"""

from kizu.detectors.efficientad.detector import EfficientAD

__all__ = ["EfficientAD"]
