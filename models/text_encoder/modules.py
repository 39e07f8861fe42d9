"""The modules after pooling: dense layers, layer norms and normalisation, each as the folder's module of that name says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from models.base import ModelLoadError
from models.checkpoints.weights import weight_files
from models.text_encoder.folder import WITH_WEIGHTS, Folder, Module

State = dict[str, torch.Tensor]
Step = Callable[[torch.Tensor], torch.Tensor]

# torch's activations that work on each component by itself and have no weights, by name: a checkpoint's name for one is looked up
# here, and never imported.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
        nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink,
    )
}  # fmt: skip


class PostPooling:
    """The modules after pooling, in their order, and the cut of vectors that the folder asks for, in float32. `width` is a
    vector's number of components."""

    def __init__(self, folder: Folder, width: int, device: torch.device, allow_pickle: bool) -> None:
        """`width` is that of a pooled row. Raises ModelLoadError."""
        self.width = width
        self._steps: list[Step] = []
        for module in folder.post_pooling:
            if module.kind == "Normalize":
                self._steps.append(normalize)
            elif module.kind in WITH_WEIGHTS:
                weights = _weights(module.path, allow_pickle)
                state = {name: tensor.to(device, torch.float32) for name, tensor in weights.items()}
                self._steps.append(self._dense(module, state) if module.kind == "Dense" else self._layer_norm(module, state))
        if cut := folder.settings.truncate_dim:
            self._steps.append(lambda rows: rows[:, :cut])
            self.width = min(self.width, cut)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Makes unit vectors, float32 (n, width), of float32 (n, pooled width), whether the folder normalises them or not."""
        for step in self._steps:
            rows = step(rows)
        return normalize(rows)

    def _dense(self, module: Module, state: State) -> Step:
        """Returns a dense layer, and takes its width. Raises ModelLoadError."""
        name = str(module.config.get("activation_function", "torch.nn.modules.activation.Tanh"))
        kind = ACTIVATIONS.get(name.rpartition(".")[2]) if name.startswith("torch.nn.") else None
        if kind is None:
            raise ModelLoadError(f"{module.path}: the activation {name!r} is not known; known are {', '.join(ACTIVATIONS)}")
        activation = kind().eval()
        weight, bias, into = state.get("linear.weight"), state.get("linear.bias"), state.get("residual.weight")
        residual = bool(module.config.get("use_residual", False))
        if weight is None or (bias is None) == bool(module.config.get("bias", True)) or weight.shape[1] != self.width:
            raise ModelLoadError(f"{module.path}: its weights are not those of a dense layer of {self.width} components")
        if residual and into is None and weight.shape[0] != self.width:
            raise ModelLoadError(f"{module.path}: the weights of its residual are missing")
        self.width = weight.shape[0]

        def dense(rows: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = activation(F.linear(rows, weight, bias))
            if not residual:
                return out
            return out + (rows if into is None else F.linear(rows, into))

        return dense

    def _layer_norm(self, module: Module, state: State) -> Step:
        """Returns a layer norm. Raises ModelLoadError."""
        weight, bias = state.get("norm.weight"), state.get("norm.bias")
        if weight is None or bias is None or weight.shape != (self.width,):
            raise ModelLoadError(f"{module.path}: its weights are not those of a layer norm of {self.width} components")
        return lambda rows: F.layer_norm(rows, (rows.shape[-1],), weight, bias)


def normalize(rows: torch.Tensor) -> torch.Tensor:
    """Scales rows to length 1; a row of zeros stays one."""
    return F.normalize(rows, dim=-1)


def _weights(path: Path, allow_pickle: bool) -> State:
    """Loads the weights in a module's folder. Raises ModelLoadError."""
    found: State = {}
    for file in weight_files(path, allow_pickle):
        pickled = file.suffix != ".safetensors"
        found |= torch.load(file, map_location="cpu", weights_only=True) if pickled else load_file(file)
    return found
