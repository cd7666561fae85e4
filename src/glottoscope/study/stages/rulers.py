"""Rulers: the token spaces in which monosemanticity is measured, clustered once per model, with their floors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glottoscope.atomic import atomic_path
from glottoscope.features.clustering import (
    Clustering,
    centre_by_language,
    cluster_tokens,
    cosine_threshold,
    random_floor,
    shuffled_floor,
    unit_rows,
)
from glottoscope.features.language import token_language
from glottoscope.study.plan import ModelRun, seed_for
from glottoscope.study.stages.context import Context

CENTRED_STRATA = 10  # of frequency, for the matched null of R


class Ruler(NamedTuple):
    """A token space, its clusters and its floors."""

    clustering: Clustering
    shuffled: Clustering
    random: Clustering | None  # of the embeddings only: it is clustered anew, and no one asks for it elsewhere
    weights: NDArray[np.int64]


def ruler_names(run: ModelRun) -> list[str]:
    """Token spaces of a model: the input embeddings and one per studied layer."""
    return ["embeddings", *(f"hidden_layer_{x:02d}" for x in run.known_layers())]


def missing_rulers(context: Context, run: ModelRun) -> list[str]:
    store = context.store
    key = context.rulers_key(run)
    return [n for n in ruler_names(run) if not store.is_done(store.ruler_dir(run.name), f"clusters_{n}", key)]


def make_rulers(root: str, model: str, names: tuple[str, ...], report: Any) -> None:
    """Cluster the tokens of some of a model's spaces."""
    context = Context.open(root)
    run = context.run_of(model)
    folder, key = context.store.ruler_dir(model), context.rulers_key(run)
    for n, name in enumerate(names):
        report(n, len(names), name)
        vectors, weights = _vectors(context, folder, name)
        features, seed = context.study.features, seed_for(context.study, "ruler", name)
        theta = features.theta
        if theta is None:
            theta = cosine_threshold(unit_rows(vectors), weights, seed=seed, percentile=features.theta_percentile)
        clustering = cluster_tokens(vectors, weights, seed=seed, theta=theta, max_tokens=features.cluster_tokens)
        tensors = {"theta": np.array([clustering.theta])}
        if clustering.labels is not None:
            tensors["labels"] = clustering.labels
        context.store.begin(folder, f"clusters_{name}")
        with atomic_path(folder / f"clusters_{name}.safetensors") as temporary:
            import torch

            save_file({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}, temporary)
        facts = {
            "theta": float(clustering.theta),
            "n_clusters": clustering.n_clusters,
            "tokens": int((weights > 0).sum()),
        }
        context.store.mark_done(folder, f"clusters_{name}", key, facts, [f"clusters_{name}.safetensors"])


def _vectors(context: Context, folder: Path, name: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Token vectors [V, D] of a space, hidden states with each language centred, and how often each token occurs."""
    tensors = load_file(folder / f"{name}.safetensors")
    vectors, weights = tensors["vectors"].numpy(), tensors["counts"].numpy().copy()
    weights[list(context.token_info.special_ids)] = 0
    if name != "embeddings":
        counts = context.vocabulary.counts
        language = token_language(counts, counts.sum(axis=0), context.neutral())
        vectors = centre_by_language(vectors, language, weights > 0)
    return vectors, weights


def load_ruler(context: Context, run: ModelRun, name: str) -> Ruler:
    """A clustered space with its floors: labels shuffled over tokens of like frequency, and random vectors."""
    folder = context.store.ruler_dir(run.name)
    vectors, weights = _vectors(context, folder, name)
    with safe_open(folder / f"clusters_{name}.safetensors", "numpy") as handle:
        theta = float(handle.get_tensor("theta")[0])
        labels = handle.get_tensor("labels") if "labels" in handle.keys() else None  # noqa: SIM118 - not a mapping
    n_clusters = len(np.unique(labels[weights > 0])) if labels is not None else None
    clustering = Clustering(unit_rows(vectors), weights > 0, theta, labels, n_clusters)
    seed = seed_for(context.study, "floors", name)
    shuffled = shuffled_floor(clustering, weights, seed=seed, n_strata=CENTRED_STRATA)
    random = None
    if name == "embeddings":
        random = random_floor(clustering, weights, seed=seed, max_tokens=context.study.features.cluster_tokens)
    return Ruler(clustering, shuffled, random, weights)
