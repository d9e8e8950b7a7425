"""Native kernels of hyperfast. Tensors come as addresses, streams as handles (csrc/bindings.cpp)."""

from typing_extensions import Buffer

with_cuda: bool
cuda_archs: str
max_layers: int
max_taps: int
most_sub_logits: int
max_tables: int
max_predict_layers: int
max_ranger_tensors: int

def instruction_set() -> str: ...

class HostBuffer(Buffer):
    def __init__(self, bytes: int) -> None: ...

def idle_host_bytes() -> int: ...
def release_idle_host_blocks() -> None: ...

class GenerateParams:
    def __init__(
        self,
        *,
        dtype: int,
        encoding: int,
        activation: int,
        negative_slope: float,
        batch: int,
        segments: int,
        condition_size: int,
        rows: int,
        hidden: int,
        widths: list[int],
        weights: list[int],
        biases: list[int],
        condition: int,
        head: int,
        offsets: int,
        chunk: int,
    ) -> None: ...
    def set_forward(self, theta0: int, theta: int) -> None: ...
    def set_backward(self, grad: int, d_condition: int, d_trunk: int, d_head: int, workspace: int) -> None: ...
    @property
    def workspace_size(self) -> int: ...

class AttentionParams:
    def __init__(self, *, dtype: int, mode: int, power: int, eps: float) -> None: ...
    def add_tap(
        self,
        *,
        batch: int,
        positions: int,
        student: int,
        student_channels: int,
        student_last: bool,
        teacher: int = 0,
        teacher_channels: int = 0,
        teacher_last: bool = False,
        d_student: int = 0,
    ) -> None: ...
    def set_forward(self, losses: int, sample_losses: int, coefficients: int) -> None: ...
    def set_backward(self, grad: int, coefficients: int, stream: bool) -> None: ...

class PairedParams:
    items: int
    def add_tap(
        self,
        *,
        student: int,
        teacher: int,
        d_student: int,
        rows: int,
        length: int,
        channels: int,
        channels_last: bool,
        factor: float,
    ) -> None: ...
    def set_losses(self, losses: int, measures: int, shares: int) -> None: ...
    def set_gradients(self, grad: int, stream: bool) -> None: ...

class ActivationBoundaryParams(PairedParams):
    def __init__(self, *, dtype: int, margin: float, packed: bool) -> None: ...

class ChannelWiseDistillationParams(PairedParams):
    def __init__(self, *, dtype: int, temperature: float) -> None: ...

class FitNetsParams(PairedParams):
    def __init__(self, *, dtype: int, normalize: bool) -> None: ...

class UnitDistanceParams(PairedParams):
    def __init__(self, *, dtype: int, power: int, eps: float, added: bool) -> None: ...

class GreedyChainParams:
    def __init__(self, *, similarity: int) -> None: ...
    def add(self, *, batch: int, count: int, dimension: int, vectors: int, order: int) -> None: ...

class _GramParams:
    def __init__(
        self,
        *,
        wide: bool,
        batch: int,
        statistics: int = 0,
        losses: int = 0,
        coefficients: int = 0,
        student_statistics: int = 0,
    ) -> None: ...
    def add_tap(
        self,
        *,
        student: int,
        student_size: int,
        student_dtype: int,
        teacher: int = 0,
        teacher_size: int = 0,
        teacher_dtype: int = 0,
    ) -> None: ...

class SimilarityParams(_GramParams): ...

class RelationalParams(_GramParams):
    def set_weights(self, distance: float, angle: float) -> None: ...

class GramGradientParams:
    def __init__(
        self, *, wide: bool, centred: bool, stream: bool, batch: int, coefficients: int, grad: int
    ) -> None: ...
    def add_tap(self, *, student: int, student_size: int, student_dtype: int, gradient: int) -> None: ...

class FlowParams:
    def __init__(self, *, dtype: int, batch: int) -> None: ...
    def add_map(
        self,
        *,
        channels: int,
        student: int,
        student_positions: int,
        teacher: int = 0,
        teacher_positions: int = 0,
        d_student: int = 0,
    ) -> None: ...
    def add_pair(self, *, first: int, second: int, statistics: int = 0, differences: int = 0) -> None: ...
    def set_forward(self, sum: bool, normalize: bool, losses: int, scales: int) -> None: ...
    def set_backward(self, grad: int, scales: int) -> None: ...

class PredictParams:
    def __init__(
        self,
        *,
        dtype: int,
        round: bool,
        concat: bool,
        slope: float,
        embeddings: list[int],
        table_rows: list[int],
        table_widths: list[int],
        weights: list[int],
        biases: list[int],
        hidden: int,
        outputs: int,
        indices: int,
        long_indices: bool,
        kernels: int,
        rows: int,
        count: int,
    ) -> None: ...
    def set_forward(self, predictions: int) -> None: ...
    def set_backward(self, grad: int, gradient: int) -> None: ...
    def set_squared_error(self, targets: int, element_weights: int, loss: int, gradient: int) -> None: ...

class LogitParams:
    def __init__(
        self,
        *,
        dtype: int,
        divergence: int,
        temperature: float,
        smoothing: float,
        rows: int,
        classes: int,
        student: int,
        teacher: int,
        labels: int,
        ignored: int,
        statistics: int,
    ) -> None: ...
    def set_forward(self, losses: int, shares: int) -> None: ...
    def set_backward(self, grad: int, d_student: int, stream: bool) -> None: ...

class SubLogitParams:
    def __init__(
        self,
        *,
        dtype: int,
        detach: bool,
        fused: bool,
        mean: bool,
        temperature: float,
        smoothing: float,
        lambda_s: float,
        lambda_t: float,
        theta: float,
        rows: int,
        stages: int,
        count: int,
        classes: int,
        student: int,
        teacher: int,
        sub_logits: int,
        labels: int,
        weights: int,
    ) -> None: ...
    def set_results(
        self,
        *,
        total: int,
        components: int,
        shares: int,
        sums: int,
        d_student: int,
        d_sub_logits: int,
        stream: bool,
    ) -> None: ...

class RankOneParams:
    def __init__(
        self,
        *,
        dtype: int,
        rule: int,
        weight_decay: float,
        step_size: float,
        shrink: float = 1.0,
        keep_first: float = 0.0,
        add_first: float = 0.0,
        keep_second: float = 0.0,
        add_second: float = 0.0,
        second_scale: float = 1.0,
        eps: float = 0.0,
        rows: int,
        hidden: int,
        segments: int,
        chunk: int,
        offsets: int,
        weight: int,
        first: int = 0,
        second: int = 0,
        left: int,
        right: int,
    ) -> None: ...

class RangerParams:
    def __init__(
        self,
        *,
        dtype: int,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        k: int,
        alpha: float,
        lr: int,
        lr_on_host: bool,
    ) -> None: ...
    def add_tensor(
        self,
        parameter: int,
        gradient: int,
        exp_avg: int,
        exp_avg_sq: int,
        slow: int,
        step: int,
        size: int,
        centralized_row: int,
    ) -> None: ...

class GatedExpertsParams:
    def __init__(
        self,
        *,
        dtype: int,
        batch: int,
        heads: int,
        outputs: int,
        rank: int,
        positions: int,
        gate_width: int,
        z: int,
        experts: int,
        bias: int,
        gate_weight: int,
        gate_bias: int,
        gate_input: int,
        output: int,
        gates: int,
    ) -> None: ...
    def set_backward(
        self,
        *,
        d_output: int,
        d_gates: int,
        d_z: int,
        d_experts: int,
        d_bias: int,
        d_gate_weight: int,
        d_gate_bias: int,
        d_gate_input: int,
    ) -> None: ...

def generate_forward_cpu(params: GenerateParams, threads: int) -> None: ...
def generate_backward_cpu(params: GenerateParams, threads: int) -> None: ...
def attention_transfer_forward_cpu(params: AttentionParams, threads: int) -> None: ...
def attention_transfer_backward_cpu(params: AttentionParams, threads: int) -> None: ...
def cross_entropy_distillation_forward_cpu(params: LogitParams, threads: int) -> None: ...
def cross_entropy_distillation_backward_cpu(params: LogitParams, threads: int) -> None: ...
def greedy_chain_cpu(params: GreedyChainParams, threads: int) -> None: ...
def predict_cpu(params: PredictParams, threads: int) -> None: ...
def rank_one_update_cpu(params: RankOneParams, threads: int) -> None: ...
def ranger_update_cpu(params: RangerParams, threads: int) -> None: ...
def gram_backward_cpu(params: GramGradientParams, threads: int) -> None: ...
def similarity_preserving_cpu(params: SimilarityParams, threads: int) -> None: ...
def relational_distance_angle_cpu(params: RelationalParams, threads: int) -> None: ...
def flow_of_solution_cpu(params: FlowParams, threads: int) -> None: ...
def gated_experts_cpu(params: GatedExpertsParams, threads: int) -> None: ...
def activation_boundary_cpu(params: ActivationBoundaryParams, threads: int) -> None: ...
def channel_wise_distillation_cpu(params: ChannelWiseDistillationParams, threads: int) -> None: ...
def fitnets_cpu(params: FitNetsParams, threads: int) -> None: ...
def sub_logit_distillation_cpu(params: SubLogitParams, threads: int) -> None: ...
def unit_distance_cpu(params: UnitDistanceParams, threads: int) -> None: ...

# Only where `with_cuda`.
def generate_forward_cuda(params: GenerateParams, stream: int, device: int) -> None: ...
def generate_backward_cuda(params: GenerateParams, ticket: int, stream: int, device: int) -> None: ...
def attention_transfer_forward_cuda(params: AttentionParams, ticket: int, stream: int, device: int) -> None: ...
def attention_transfer_backward_cuda(params: AttentionParams, stream: int, device: int) -> None: ...
def cross_entropy_distillation_forward_cuda(params: LogitParams, ticket: int, stream: int, device: int) -> None: ...
def cross_entropy_distillation_backward_cuda(params: LogitParams, stream: int, device: int) -> None: ...
def rank_one_update_cuda(params: RankOneParams, stream: int, device: int) -> None: ...
def ranger_update_cuda(params: RangerParams, ticket: int, stream: int, device: int) -> None: ...
def activation_boundary_cuda(params: ActivationBoundaryParams, ticket: int, stream: int, device: int) -> None: ...
def channel_wise_distillation_cuda(
    params: ChannelWiseDistillationParams, ticket: int, stream: int, device: int
) -> None: ...
def fitnets_cuda(params: FitNetsParams, ticket: int, stream: int, device: int) -> None: ...
def sub_logit_distillation_cuda(params: SubLogitParams, ticket: int, stream: int, device: int) -> None: ...
def unit_distance_cuda(params: UnitDistanceParams, ticket: int, stream: int, device: int) -> None: ...
