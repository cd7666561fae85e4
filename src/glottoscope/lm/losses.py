"""Next-token loss of a language model per language, with the logits in bounded chunks.

Shape legend: B sequences, T positions, D d_model, V vocabulary, G languages; M counted targets, C one chunk of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glottoscope.errors import InputError
from glottoscope.lm.capture import forward_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_PER_CHUNK = 1 << 23  # 32 MiB of float32
# What Gemma 2, Cohere and Granite do to the head's output, and the value that does nothing.
HEAD_EXTRAS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


def lm_loss(
    model: PreTrainedModel,
    tokens_BT: Tensor,
    attention_BT: Tensor,
    count_BT: Tensor,
    language_BT: Tensor,
    n_languages: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of -log p(token | tokens before it) in nats, per language of the predicted token.

    Args:
        tokens_BT: LongTensor; attention_BT: nonzero at real tokens.
        count_BT: bool, the target positions that count (the position mask); column 0 has no prediction and never
            counts.
        language_BT: language index of every position, 0..n_languages - 1 where counted.

    Returns:
        (nll_sum float64 [G], n int64 [G]).

    Raises:
        InputError: the model transforms its logits in a way that is not known here.
    """
    check_head(model)
    with torch.no_grad():
        output = model.base_model(input_ids=tokens_BT, **forward_arguments(model, attention_BT))
    return loss_of_hidden(model, output.last_hidden_state, tokens_BT, count_BT, language_BT, n_languages)


def check_head(model: PreTrainedModel) -> None:
    """Raises InputError where the model transforms its logits in a way that is not known here."""
    for name, neutral in HEAD_EXTRAS.items():
        if getattr(model.config, name, neutral) not in (None, neutral):
            raise InputError(f"{type(model).__name__} changes its logits ({name}): its loss is not supported")


def loss_of_hidden(
    model: PreTrainedModel, hidden_BTD: Tensor, tokens_BT: Tensor, count_BT: Tensor, language_BT: Tensor, n_languages: int
) -> tuple[np.ndarray, np.ndarray]:
    """`lm_loss` from the base model's last hidden state, after the final norm."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[assignment]
    with torch.no_grad():
        counted = count_BT[:, 1:].bool()
        hidden_MD = hidden_BTD[:, :-1][counted]
        target_M = tokens_BT[:, 1:][counted].long()
        language_M = language_BT[:, 1:][counted].long()
        n_rows = max(1, LOGITS_PER_CHUNK // int(model.config.get_text_config().vocab_size))
        nll_M = torch.empty(len(target_M), device=hidden_MD.device)
        for i in range(0, len(target_M), n_rows):
            logits_CV = head(hidden_MD[i : i + n_rows]).float()
            nll_M[i : i + n_rows] = F.cross_entropy(logits_CV, target_M[i : i + n_rows], reduction="none")
    language = language_M.cpu().numpy()
    nll_sum = np.bincount(language, weights=nll_M.cpu().double().numpy(), minlength=n_languages)
    return nll_sum, np.bincount(language, minlength=n_languages).astype(np.int64)
