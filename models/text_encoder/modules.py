"""What comes after pooling: dense layers, layer norms, and normalising, each as the folder's module of that name says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from models.base import ModelLoadError
from models.text_encoder.folder import Folder, Module

State = dict[str, torch.Tensor]
Head = Callable[[torch.Tensor], torch.Tensor]

# torch's activations that work on each component by itself and have no weights, by name: a name is looked up and never imported.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish,
        nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.Tanh, nn.Tanhshrink,
    )
}  # fmt: skip


class Heads:
    """The modules after pooling, in their order, and the cut that the folder asks for, in float32. `state` has their weights,
    `width` is that of a vector."""

    def __init__(self, folder: Folder, width: int, device: torch.device, allow_pickle: bool) -> None:
        """`width` is that of a pooled row. Raises ModelLoadError."""
        self.width = width
        self.state: State = {}
        self._run: list[Head] = []
        for index, module in enumerate(folder.heads):
            if module.kind == "Normalize":
                self._run.append(normalize)
            elif module.kind != "Dropout":
                state = {name: tensor.to(device, torch.float32) for name, tensor in _weights(module.path, allow_pickle).items()}
                self._run.append(self._dense(module, state) if module.kind == "Dense" else self._layer_norm(module, state))
                self.state |= {f"heads.{index}.{name}": tensor for name, tensor in state.items()}
        if cut := folder.settings.truncate_dim:
            self._run.append(lambda rows: rows[:, :cut])
            self.width = min(self.width, cut)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 (n, pooled width) -> unit vectors, float32 (n, width), whether the folder normalises or not."""
        for head in self._run:
            rows = head(rows)
        return normalize(rows)

    def _dense(self, module: Module, state: State) -> Head:
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

    def _layer_norm(self, module: Module, state: State) -> Head:
        weight, bias = state.get("norm.weight"), state.get("norm.bias")
        if weight is None or bias is None or weight.shape != (self.width,):
            raise ModelLoadError(f"{module.path}: its weights are not those of a layer norm of {self.width} components")
        return lambda rows: F.layer_norm(rows, (rows.shape[-1],), weight, bias)


def normalize(rows: torch.Tensor) -> torch.Tensor:
    """Rows scaled to length 1; a row of zeros stays one."""
    return F.normalize(rows, dim=-1)


def _weights(path: Path, allow_pickle: bool) -> State:
    if (path / "model.safetensors").exists():
        return load_file(path / "model.safetensors")
    if not (path / "pytorch_model.bin").exists():
        raise ModelLoadError(f"{path}: the weights (model.safetensors) are missing")
    if not allow_pickle:
        raise ModelLoadError(f"{path}: the weights are pickled (pytorch_model.bin), which runs code: ALLOW_PICKLE=true allows it")
    found: State = torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)
    return found
