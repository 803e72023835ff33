"""Options of the trainer: frozen dataclasses that tyro turns into a command line.

The text after a field is its help. tyro keeps the line breaks, so they are between sentences.
"""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from examples.train import ranges
from examples.train.errors import TrainError

MLP = Literal["dense", "moe", "latent_moe"]
Eight = Literal["fp8_block", "fp8_block_pow2", "fp8_tensor", "fp8_channel", "int8"]
Four = Literal["mxfp4", "nvfp4", "int4_32", "int4_128", "int4_32_zero", "int4_128_zero"]
BaseFormat = Literal["dense", Eight, Four]
"""dense, and the formats of jax_latent_moe.formats in 8 and 4 bits."""
SMALLEST_BPE = 258
"""The smallest vocabulary of byte pairs: all bytes, one pair, and the separator."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the language model.

    The sizes of the experts are those of `--mlp latent_moe`. Other feed-forwards get sizes with the same active FLOPs.
    """

    layers: int = 4
    """Number of transformer blocks. The first has a dense feed-forward, the others have the one that --mlp names."""
    hidden_size: int = 128
    """Width of the residual stream."""
    heads: int = 2
    """Number of attention heads. hidden_size / heads must be even, because rotary embedding rotates pairs."""
    context: int = 256
    """Number of tokens that the model sees at once. Without a tokenizer a token is a byte."""
    latent_size: int = 64
    """Width of the latent that the routed experts read and write."""
    num_experts: int = 32
    """Number of routed experts in a layer."""
    top_k: int = 4
    """Number of experts that read a token."""
    expert_intermediate_size: int = 128
    """Inner width of a routed expert."""
    shared_expert_intermediate_size: int = 256
    """Inner width of the shared expert, which reads every token at full width. 0 leaves it out."""
    latent_norm: Literal["none", "pre", "post"] = "none"
    """Place of the RMSNorm in the latent width: before the experts (pre), after the combine (post), or none."""
    routed_scaling_factor: float = 1.0
    """Factor on the weights of a token's experts."""
    dropout: float = 0.0
    """Probability that an element of an attention or feed-forward output is dropped in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation. Parameters and optimiser stay in float32."""
    backend: Literal["auto", "xla", "pallas", "cutlass"] = "auto"
    """Backend of the grouped matmuls. auto takes the fastest one that can run here."""

    def __post_init__(self):
        ranges.check_numbers(self, "model.", ranges.MODEL)
        ranges.check_choices(self, "model.")
        if self.hidden_size % (2 * self.heads):
            raise TrainError(
                f"model.hidden_size={self.hidden_size} must be a multiple of twice model.heads={self.heads}, because "
                "rotary embedding rotates the features of a head in pairs: change one of them."
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser and the schedule of its learning rate: a linear warm-up and a cosine decay."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimiser. muon orthogonalises the update of each matrix, expert by expert, and leaves the rest to adamw."""
    learning_rate: float = 4e-3
    """Peak learning rate."""
    final_fraction: float = 0.05
    """Learning rate of the last step, as a fraction of the peak."""
    warmup_steps: int = 50
    """Number of steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices. It is multiplied by the learning rate."""
    b1: float = 0.9
    """Decay rate of Adam's first moment."""
    b2: float = 0.98
    """Decay rate of Adam's second moment."""
    momentum: float = 0.95
    """Momentum of muon."""
    clip: float = 1.0
    """Largest global norm of the gradient."""

    def __post_init__(self):
        ranges.check_numbers(self, "optimizer.", ranges.OPTIMIZER)
        ranges.check_choices(self, "optimizer.")
        ranges.check_unused(self, "optimizer.", ("momentum",), self.name == "muon", "--optimizer.name muon")


BALANCING = ("switch_loss_coef", "sequence_loss_coef", "bias_update")
"""Options that have no effect on a dense model, and must have their defaults there."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a language model on text and ends with its validation bits per byte.

    A second run with the same folder resumes from its newest checkpoint.
    """

    config: Path | None = None
    """JSON file of options, such as the config.json of a run. Its values are the defaults of all options.
    An option on the command line wins."""
    preset: Literal["auto", "toy", "cpu", "gpu", "gpu-80gb", "gpu-x8"] = "auto"
    """Set of defaults for all options. toy is for tests. cpu and gpu train for minutes.
    gpu-80gb is for one GPU of 80 GB, gpu-x8 for a host of eight GPUs. auto is gpu if JAX finds a GPU, else cpu."""
    mlp: MLP = "latent_moe"
    """Feed-forward of every block but the first. dense and moe have the same active FLOPs as latent_moe."""
    precision: Literal["dtype", "fp8"] = "dtype"
    """Numbers in which the routed experts multiply. dtype is model.dtype for all products.
    fp8 rounds both operands of the forward products and input gradients to block FP8."""
    data: str = "shakespeare"
    """Text to train on: shakespeare (36 plays), stdlib (the sources of Python's library), or a file or folder.
    Files hold plain text, JSON lines (.jsonl, .jsonl.gz, .jsonl.zst) or Parquet (.parquet)."""
    data_column: str = "text"
    """Field of JSON lines and column of Parquet files that hold the text."""
    validation: tuple[str, ...] = ()
    """More texts to validate on, as NAME=PATH, such as code=src wiki=wiki.txt. A path is a file or folder as in --data.
    Each text gets its own line, curve and final bits per byte."""
    tokenizer: str = "bytes"
    """bytes makes each byte a token. bpe:N learns N tokens from the training text and keeps them with the run."""
    documents: bool = False
    """Whether attention and loss stay within a document. A text file, a JSON line and a Parquet row are documents."""
    base: Path | None = None
    """Folder of a run to fine-tune with --lora. The new run copies its newest weights and leaves them as they are."""
    base_format: BaseFormat = "dense"
    """Format of the frozen experts, such as mxfp4. dense keeps them in float32."""
    lora: int = 0
    """Rank of the low-rank adapters on the experts and the two projections of each layer, with --base.
    They alone are trained, and the correction biases move. 0 trains all weights."""
    lora_alpha: float = 16.0
    """Factor on the adapters, divided by their rank."""
    run: Path | None = None
    """Folder of the run, for checkpoints, metrics and plots. The default is runs/DATA-PRESET-MLP."""
    steps: int = 600
    """Number of optimiser steps of the whole run."""
    batch_size: int = 16
    """Number of windows of model.context tokens in a step."""
    accumulate: int = 1
    """Number of parts of a batch. They are computed one after the other, which saves memory."""
    attention: Literal["auto", "cudnn", "xla", "blocks"] = "auto"
    """Implementation of attention.
    cudnn is cuDNN's kernel (GPU, bfloat16), xla is JAX's own formula, blocks computes blocks of queries.
    auto is cudnn if it can run here, else blocks."""
    norms: Literal["auto", "xla", "pallas"] = "auto"
    """Implementation of norms and rotations. pallas is kernels of one pass over memory (NVIDIA Hopper GPUs).
    auto is pallas if they can run here, else xla."""
    scan_layers: bool = False
    """Whether all blocks after the first are compiled once and scanned.
    Compilation then takes the same time at any depth."""
    remat: Literal["none", "cheap", "layer"] = "none"
    """What the backward pass recomputes to save memory.
    none is nothing, cheap is norms, activations and gathers of rows, layer is whole blocks."""
    seed: int = 0
    """Seed of the parameters, the order of the data, dropout and the sample."""
    switch_loss_coef: float = 0.0
    """Coefficient of the Switch load-balancing loss.
    Beside a correction bias of rate 0.01, a loss of 0.01 balanced 64 experts worse than either alone."""
    sequence_loss_coef: float = 0.0
    """Coefficient of the same loss within each window; with --documents, within each document."""
    bias_update: Literal["sign", "quantile"] = "sign"
    """What moves the correction bias, which balances the experts.
    sign is the sign of an expert's missing load, quantile the scores that would balance the loads."""
    bias_update_rate: float = 1e-2
    """Step size of the correction bias. With quantile, the share of the way to the target, at most 1.
    dense has no correction bias."""
    log_every: int = 20
    """Number of steps between lines of metrics."""
    eval_every: int = 50
    """Number of steps between validations on a part of the held-out text. The end of a run reads all of it."""
    checkpoint_every: int = 100
    """Number of steps between checkpoints."""
    restore: Literal["newest", "previous"] = "newest"
    """Checkpoint to resume from. previous deletes the newest one, which helps if that is damaged."""
    bad_step: Literal["stop", "skip"] = "stop"
    """What happens if a loss or gradient is not finite, or a loss spikes. stop ends the run, skip drops the step."""
    spike_factor: float = 0.0
    """A loss above this factor times the smoothed loss is a spike. 0 switches the check off."""
    mesh: str = ""
    """Number of devices along the axes data, fsdp, expert and tensor, such as data=2,expert=4. Empty takes one device.
    With several processes it takes all devices along data."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which devices add up the gradients of kernels. bfloat16 sends half of the bytes and rounds the sums.
    It needs a mesh, model.dtype bfloat16 and products in it."""
    coordinator: str = ""
    """HOST:PORT of process 0, if several processes train together. auto reads it from SLURM, Kubernetes or Open MPI."""
    processes: int = 1
    """Number of processes that train together, with --coordinator HOST:PORT."""
    process: int = 0
    """Index of this process, with --coordinator HOST:PORT."""
    profile: str = ""
    """FIRST:LAST traces these steps into the run's folder, such as 10:13."""
    wandb: bool = False
    """Whether metrics also go to Weights & Biases. This needs the package wandb."""
    trackio: bool = False
    """Whether metrics also go to trackio. This needs the package trackio."""
    sample_bytes: int = 400
    """Length in bytes of the text that the model writes at the end."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """Shape of the model."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """Optimiser and schedule."""

    def __post_init__(self):
        ranges.check_numbers(self, "", ranges.RUN)
        ranges.check_choices(self, "")
        for option in ("data", "data_column", "run", "config", "base"):
            ranges.check_text(option.replace("_", "-"), getattr(self, option) or "")
        for named in self.validation:
            ranges.check_text("validation", named)
        ranges.check_validation(self.validation)
        ranges.check_mesh(self.mesh)
        ranges.check_processes(self.coordinator, self.processes, self.process)
        routed, latent = self.mlp != "dense", self.mlp == "latent_moe"
        ranges.check_unused(self, "", BALANCING, routed, "--mlp moe or latent_moe")
        ranges.check_unused(self.model, "model.", ("routed_scaling_factor",), routed, "--mlp moe or latent_moe")
        ranges.check_unused(self, "", ("precision",), routed, "--mlp moe or latent_moe")
        ranges.check_unused(self.model, "model.", ("latent_norm",), latent, "--mlp latent_moe")
        self._check_adapters()
        self._check_reduction()
        if self.spike_factor and not self.spike_factor > 1:
            raise TrainError(f"spike_factor={self.spike_factor} must be more than 1, or 0 to switch the check off.")
        if self.tokenizer != "bytes" and self.bpe_tokens is None:
            raise TrainError(f"--tokenizer {self.tokenizer} must be bytes, or bpe:N with N at least {SMALLEST_BPE}.")
        if self.profile and self.profiled_steps is None:
            raise TrainError(f"--profile {self.profile} must be FIRST:LAST, two steps from 1 on, such as 10:13.")

    def _check_adapters(self):
        ranges.check_unused(self, "", ("lora_alpha", "base_format"), self.lora > 0, "--lora RANK")
        if (self.base is None) != (self.lora == 0):
            raise TrainError(
                f"--lora {self.lora} and --base {self.base} belong together: --base names a run, and --lora gives the "
                "rank of its adapters, at least 1."
            )
        if not self.lora:
            return
        if self.mlp == "dense" or self.model.layers == 1:
            raise TrainError(
                f"--lora {self.lora} needs a block with experts: give --mlp moe or latent_moe and --model.layers of at "
                "least 2, because the first block is dense."
            )
        if self.optimizer.name != "adamw":
            raise TrainError(f"--lora {self.lora} needs --optimizer.name adamw, because muon trains whole matrices.")
        if self.mesh or self.coordinator:
            raise TrainError(f"--lora {self.lora} trains on one device: leave out --mesh and --coordinator.")
        if self.precision != "dtype":
            raise TrainError(f"--lora {self.lora} multiplies in model.dtype: leave out --precision {self.precision}.")

    def _check_reduction(self):
        ranges.check_unused(self, "", ("reduce_dtype",), bool(self.mesh or self.coordinator), "--mesh or --coordinator")
        if self.reduce_dtype == "float32":
            return
        if self.model.dtype != "bfloat16":
            raise TrainError(
                f"--reduce-dtype {self.reduce_dtype} needs --model.dtype bfloat16, because gradients computed in "
                f"{self.model.dtype} would lose digits: give that, or leave out --reduce-dtype."
            )
        if self.precision != "dtype":
            raise TrainError(
                f"--reduce-dtype {self.reduce_dtype} needs --precision dtype, because {self.precision} encodes the "
                "weights from float32: leave out one of the two."
            )

    @property
    def validation_paths(self) -> dict[str, Path]:
        """The paths of --validation by their names."""
        return {name: Path(path).expanduser() for name, _, path in (named.partition("=") for named in self.validation)}

    @property
    def bpe_tokens(self) -> int | None:
        """N of `--tokenizer bpe:N`. None for any other tokenizer."""
        found = re.fullmatch(r"bpe:([0-9]{1,9})", self.tokenizer)
        return int(found[1]) if found and int(found[1]) >= SMALLEST_BPE else None

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first and the last step to profile. None without a valid --profile."""
        found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", self.profile)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            return None
        return int(found[1]), int(found[2])

    @property
    def folder(self) -> Path:
        """The folder of the run: `run`, or a name made of data, preset and mlp."""
        if self.run is not None:
            return self.run
        return Path("runs") / f"{Path(self.data).resolve().name}-{self.preset}-{self.mlp}"
