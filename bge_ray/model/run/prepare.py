"""A resolved model to an `Executor`: checked against its hash, loaded, and laid out for its device."""

import functools

import torch

from bge_ray.errors import ModelError
from bge_ray.model.run.executor import Compute, Executor
from bge_ray.model.run.last_layer import keep_one_token
from bge_ray.model.run.load import Kind, load_config, load_model
from bge_ray.model.run.packed import ATTENTION, can_pack, register
from bge_ray.model.run.prepack import prepack_linears
from bge_ray.model.source import fetch_model, hash_model


def prepare_executor(
    name: str,
    revision: str | None,
    weights_sha256: str,
    kind: Kind,
    pooling: str,
    compute: Compute,
    *,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    packed: bool | None,
) -> Executor:
    """Load a model and make it ready to run.

    Args:
        name: hub id or folder.
        revision: commit on the hub.
        weights_sha256: what `hash_model` gave when the run was planned.
        kind: encoder or cross-encoder.
        pooling: which of a row's last states are looked at: cls, mean or last_token.
        compute: what a forward pass computes.
        dtype: a torch dtype by name.
        device: a torch device.
        trust_remote_code: run Python code found in the folder.
        packed: run without padding; None where it is known to be right and faster.

    Raises:
        ModelError: the weights here are not those of the plan, or some would stay random.
    """
    folder, _ = fetch_model(name, revision)
    if hash_model(str(folder)) != weights_sha256:
        raise ModelError(
            f"{folder}: its files differ from those the run was planned with; "
            "give every node the same model folder"
        )
    place = torch.device(device)
    number = getattr(torch, dtype)
    load = functools.partial(load_model, folder, kind=kind, trust_remote_code=trust_remote_code)
    if packed is None:
        # Remote code has a forward pass of its own, of which nothing is known.
        packed = not trust_remote_code and can_pack(load_config(folder), place, number)
    if packed:
        register()
    model = load(number, attention=ATTENTION if packed else None)
    if packed:
        keep_one_token(model, pooling)
    if place.type == "cpu":
        prepack_linears(model)
    return Executor(model, compute, lambda: load(torch.float32), device=place, packed=packed)
