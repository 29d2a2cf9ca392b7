"""What calibration learns about one layer, and the file that keeps it.

Shapes: E experts, d hidden size, m expert width, n input rows (2m with a gate), N = n. All sums run over the calibration tokens routed to
the expert; p is the routing weight with which the expert's output enters the layer's.
"""

from dataclasses import dataclass

import torch


@dataclass
class LayerStatistics:
    """Sums over the calibration text for one layer's routed experts; float32 or float64 on the host.

    Attributes:
        layer: index of the decoder layer.
        tokens: calibration tokens that passed the layer.
        count_E: tokens routed to each expert (n_e), int64.
        weight_square_E: Σ p², what a sum over p² has to be divided by to become a mean.
        input_gram_EDD: C_e = Σ p² x xᵀ.
        output_gram_EDD: O_e = Σ p² y yᵀ (y without its bias: it is what the output matrix makes).
        intermediate_gram_EMM: H_e = Σ p² h hᵀ, or None when calibration did not collect it (wide experts).
        input_mean_ED: mean |x| of each channel (unweighted; ASVD).
        intermediate_mean_EM: mean |h| of each channel (unweighted; ASVD).
        outlier_E: a_e, the share of the expert's activations h with |h| > τ·mean|h| (Eq. 10).
        input_outlier: OWL's layer outlier ratio: share of |W_ij|·‖x_j‖ above M times their mean (M = 5), over all experts' input matrices.
        principal_rank_E: r_e = #{σ_i > 1e-2·σ_max}, summed over the expert's input and output matrix (Alg. 1), int64.
        saliency_E: mean(p·‖y‖) (REAP).
        slope_EN: Σ p² (∂h_i(j)/∂pre_j)² for every input row j.
        gradient_gram_DD: Γ·tokens = Σ g gᵀ, g the gradient of the summed NLL at the layer's expert output; None without a backward pass.
        gradient_tokens: tokens behind `gradient_gram_DD`.
    """

    layer: int
    tokens: int
    count_E: torch.Tensor
    weight_square_E: torch.Tensor
    input_gram_EDD: torch.Tensor
    output_gram_EDD: torch.Tensor
    input_mean_ED: torch.Tensor
    intermediate_mean_EM: torch.Tensor
    outlier_E: torch.Tensor
    input_outlier: float
    principal_rank_E: torch.Tensor
    saliency_E: torch.Tensor
    slope_EN: torch.Tensor
    intermediate_gram_EMM: torch.Tensor | None = None
    gradient_gram_DD: torch.Tensor | None = None
    gradient_tokens: int = 0
