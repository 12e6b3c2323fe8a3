"""PatchCore: a patch is as anomalous as it is far from the nearest patch of good parts.

Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022 (arXiv:2106.08265). Step by step, with
the paper's sections and equations, and the file to read:

1. Embedding (3.1). Some layers of a pretrained network are tapped. A patch's feature is the mean over its p × p
   neighbourhood:  φ(N_p(h, w)) = f_agg{ φ(a, b) | (a, b) ∈ N_p(h, w) }  (Eqs. 1 and 2).
   `graph.py`, `PatchCoreGraph.embed`; the pooling itself is `kizu.features.patch_features`.
2. Memory bank (3.1). The features of all good images' patches:  M = ∪ P(φ(x_i))  (Eqs. 3 and 4).
   `feature_table.py` keeps them in little memory.
3. Coreset (3.2). The few of them that cover all others best:
   M_C = argmin max_{m ∈ M} min_{n ∈ M_C} ‖m − n‖  (Eq. 5), chosen greedily (Algorithm 1).
   `coreset.py`, `k_center`; `memory_bank.py` holds what is chosen.
4. Nearest neighbours (3.3). Each patch m_t of a new image finds the nearest entry m*:  min_{m ∈ M_C} ‖m_t − m‖.
   `nearest.py`, `nearest`.
5. Score (3.3). The largest of these distances:  s* = max_t ‖m_t − m*‖  (Eq. 6), which Eq. 7 can weight:
   s = (1 − exp‖m_t − m*‖ / Σ_{m ∈ N_b(m*)} exp‖m_t − m‖) · s*.
   `graph.py`, `PatchCoreGraph.score_from_neighbours`.
6. Map (3.3). The distances, upsampled and smoothed by a Gaussian of σ = 4.
   `graph.py`, `PatchCoreGraph.forward`; `kizu.features.anomaly_map`.

Beyond the paper, and switchable: a bank a layer instead of one of all layers (`fusion`), distances in units of what is
typical around an entry (`local_scale`, in `memory_bank.py`), and a score from the most anomalous patches instead of one
(`top`). The threshold, which the paper leaves open, follows from the good images themselves: `leave_one_out.py` scores
each as if it had not been learned from. `detector.py` puts the steps together, and updates and merges what was learned.
"""
