"""Options of the trainer: frozen dataclasses, turned into a command line by tyro."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from examples.train import ranges
from examples.train.errors import TrainError

MLP = Literal["dense", "moe", "latent_moe"]
SMALLEST_BPE = 258
"""All bytes, one more token, and the separator."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shape of the language model; the expert sizes are those of `--mlp latent_moe`, the others are fitted to it."""

    layers: int = 4
    """Transformer blocks; the first has a dense feed-forward, the others the one that --mlp names."""
    hidden_size: int = 128
    """Width of the residual stream."""
    heads: int = 2
    """Attention heads; hidden_size / heads must be even (rotary embedding turns pairs)."""
    context: int = 256
    """Tokens that the model sees at once; without a tokenizer a token is a byte."""
    latent_size: int = 64
    """Width in which the routed experts work."""
    num_experts: int = 32
    """Routed experts of one layer."""
    top_k: int = 4
    """Experts that read one token."""
    expert_intermediate_size: int = 128
    """Inner width of a routed expert."""
    shared_expert_intermediate_size: int = 256
    """Inner width of the shared expert, which reads every token at full width; 0 is none."""
    latent_norm: Literal["none", "pre", "post"] = "none"
    """RMSNorm in the latent width: before the experts, after their combination, or none."""
    routed_scaling_factor: float = 1.0
    """Factor on the weights with which a token's experts are added up."""
    dropout: float = 0.0
    """Chance that an output of attention or feed-forward is dropped in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters and the optimiser stay float32."""
    backend: Literal["auto", "xla", "pallas", "cutlass"] = "auto"
    """Backend of the grouped matmuls."""

    def __post_init__(self):
        ranges.check_numbers(self, "model.", ranges.MODEL)
        if self.hidden_size % (2 * self.heads):
            raise TrainError(
                f"model.hidden_size={self.hidden_size} must be a multiple of twice model.heads={self.heads}: "
                "rotary embedding turns the features of a head in pairs."
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser, its warm-up and its cosine decay."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon orthogonalises the update of each matrix (one expert at a time) and leaves the rest to adamw."""
    learning_rate: float = 4e-3
    """Peak learning rate."""
    final_fraction: float = 0.05
    """Learning rate of the last step, as a fraction of the peak."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, multiplied by the learning rate."""
    b1: float = 0.9
    """Decay of Adam's first moment."""
    b2: float = 0.98
    """Decay of Adam's second moment."""
    momentum: float = 0.95
    """Momentum of muon."""
    clip: float = 1.0
    """Largest global norm of the gradient."""

    def __post_init__(self):
        ranges.check_numbers(self, "optimizer.", ranges.OPTIMIZER)
        ranges.check_unused(self, "optimizer.", ("momentum",), self.name == "muon", "--optimizer.name muon")


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a language model on text and ends with its validation bits per byte.

    A second run with the same folder resumes from its newest checkpoint.
    """

    preset: Literal["auto", "toy", "cpu", "gpu", "gpu-80gb", "gpu-x8"] = "auto"
    """Sizes that every option below starts from: toy for tests, cpu and gpu for a run of minutes, gpu-80gb for one GPU
    of 80 GB, gpu-x8 for a host of eight; auto is gpu where JAX finds one, in as many parts as its memory asks for, else
    cpu."""
    mlp: MLP = "latent_moe"
    """Feed-forward of every block but the first; dense and moe have the active FLOPs of latent_moe."""
    data: str = "shakespeare"
    """shakespeare (38 plays, fetched once), stdlib (the sources of Python's library), or a file or folder of text, JSON
    lines (.jsonl, .jsonl.gz, .jsonl.zst) or .parquet."""
    data_column: str = "text"
    """Field of JSON lines and column of Parquet files that holds their text."""
    tokenizer: str = "bytes"
    """bytes, or bpe:N for N tokens learnt from the training text and kept in the run's folder."""
    documents: bool = False
    """Whether attention and loss stay within a document: a file, a line of JSON, a row of Parquet."""
    run: Path | None = None
    """Folder of checkpoints, metrics and plots; left out, runs/DATA-PRESET-MLP."""
    steps: int = 600
    """Optimiser steps of the whole run."""
    batch_size: int = 16
    """Windows of model.context tokens in one step."""
    accumulate: int = 1
    """Parts of a step's batch that are computed one after the other, in as much less memory."""
    attention: Literal["auto", "cudnn", "xla", "blocks"] = "auto"
    """Attention: cuDNN's kernel (GPUs, bfloat16), JAX's own formula, or blocks of queries; auto is cudnn where that
    runs, else blocks."""
    scan_layers: bool = False
    """Whether all blocks but the first are compiled once and scanned, which compiles as fast at any depth."""
    remat: Literal["none", "cheap", "layer"] = "none"
    """What the backward pass computes again to save memory: nothing, norms and activations, or all of a block."""
    seed: int = 0
    """Seed of the parameters, the order of the data, dropout and the sample."""
    switch_loss_coef: float = 0.01
    """Coefficient of the Switch load-balancing loss, beside the correction bias."""
    bias_update_rate: float = 1e-2
    """Step of the correction bias that balances the experts; dense has none."""
    log_every: int = 20
    """Steps between lines of metrics."""
    eval_every: int = 50
    """Steps between looks at a part of the validation text; the whole of it is read at the end."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    restore: Literal["newest", "previous"] = "newest"
    """Checkpoint that a run goes on from; previous deletes the newest, for when that is damaged."""
    bad_step: Literal["stop", "skip"] = "stop"
    """What a step does whose loss or gradient is not finite, or spikes: end the run, or leave the state as it was."""
    spike_factor: float = 0.0
    """A loss this many times the smoothed loss before it is a spike; 0 looks for none."""
    mesh: str = ""
    """Devices along the axes data, fsdp, expert, tensor, such as data=2,expert=4; empty is one device, or data over all
    devices of several processes."""
    coordinator: str = ""
    """HOST:PORT of process 0 where several processes train together; auto asks SLURM, Kubernetes or Open MPI."""
    processes: int = 1
    """Processes that train together, with --coordinator HOST:PORT."""
    process: int = 0
    """Index of this process among them."""
    profile: str = ""
    """FIRST:LAST, steps of which a trace is written to the run's folder, such as 10:13."""
    wandb: bool = False
    """Whether metrics also go to Weights & Biases, where its package is installed."""
    trackio: bool = False
    """Whether metrics also go to trackio, where that package is installed."""
    sample_bytes: int = 400
    """Length of the text generated at the end."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """Shape of the model."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    """Optimiser and schedule."""

    def __post_init__(self):
        ranges.check_numbers(self, "", ranges.RUN)
        for option in ("data", "data_column", "run"):
            ranges.check_text(option.replace("_", "-"), getattr(self, option) or "")
        ranges.check_mesh(self.mesh)
        ranges.check_processes(self.coordinator, self.processes, self.process)
        routed, latent = self.mlp != "dense", self.mlp == "latent_moe"
        ranges.check_unused(self, "", ("switch_loss_coef",), routed, "--mlp moe or latent_moe")
        ranges.check_unused(self.model, "model.", ("routed_scaling_factor",), routed, "--mlp moe or latent_moe")
        ranges.check_unused(self.model, "model.", ("latent_norm",), latent, "--mlp latent_moe")
        if self.spike_factor and not self.spike_factor > 1:
            raise TrainError(f"spike_factor={self.spike_factor} must be more than 1, or 0 to look for no spikes.")
        if self.tokenizer != "bytes" and self.bpe_tokens is None:
            raise TrainError(f"--tokenizer {self.tokenizer} must be bytes, or bpe:N with N from {SMALLEST_BPE} on.")
        if self.profile and self.profiled_steps is None:
            raise TrainError(f"--profile {self.profile} must be FIRST:LAST, two steps from 1 on, such as 10:13.")

    @property
    def bpe_tokens(self) -> int | None:
        """N of `--tokenizer bpe:N`; None of anything else."""
        found = re.fullmatch(r"bpe:([0-9]{1,9})", self.tokenizer)
        return int(found[1]) if found and int(found[1]) >= SMALLEST_BPE else None

    @property
    def profiled_steps(self) -> tuple[int, int] | None:
        """The first and the last step to profile; None of none."""
        found = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", self.profile)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            return None
        return int(found[1]), int(found[2])

    @property
    def folder(self) -> Path:
        """Where the run writes: `run`, or a name made of data, preset and mlp."""
        if self.run is not None:
            return self.run
        return Path("runs") / f"{Path(self.data).resolve().name}-{self.preset}-{self.mlp}"
