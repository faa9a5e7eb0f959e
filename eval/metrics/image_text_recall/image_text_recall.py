"""Image-text recall as a metric of the `evaluate` library, scored by eval.ranks. From the root of a clone:

python -c 'import evaluate; print(evaluate.load("eval/metrics/image_text_recall").inputs_description)'

`evaluate` copies this file into its module cache and imports the copy, so nothing can be imported relative to it:
`eval` is found on `sys.path`, where `python -m`, `python -c` and notebooks put the folder they are started in. Anywhere
else PYTHONPATH has to name the clone.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

_DESCRIPTION = """
Any-hit recall at 1, 5 and 10 of image-text retrieval in both directions, and their mean. Ranks are exact, and answers
that score the same are in random order: a constant model scores chance.
"""

_INPUTS = """
Args:
    image_embeds: [N, d] floats: a tensor, an array or lists. Unit rows give cosine similarity: nothing is normalised
        here.
    text_embeds: [M, d] floats.
    text_to_image: [M] integers in [0, N), the image that each text belongs to.

Returns:
    Fractions in [0, 1]: "text_to_image_R@1", "text_to_image_R@5", "text_to_image_R@10", "image_to_text_R@1",
    "image_to_text_R@5", "image_to_text_R@10", "mean_recall".

Raises:
    ValueError: for embeddings that are missing, and as eval.ranks.retrieval_ranks.

Examples:
    >>> recall = evaluate.load("eval/metrics/image_text_recall")
    >>> images, texts = [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.1], [0.9, 0.1]]
    >>> recall.compute(image_embeds=images, text_embeds=texts, text_to_image=[0, 1])
    {'text_to_image_R@1': 0.5, ..., 'mean_recall': 0.875}
"""


class ImageTextRecall(evaluate.Metric):
    """R@K in both directions; see the description of its inputs."""

    def _info(self) -> evaluate.MetricInfo:
        # A metric's features are columns of one table, all of one length, and a column of rows comes back as lists of
        # Python floats (19 million for COCO). Embeddings are therefore arguments of `compute`, in their own precision.
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"text_to_image": datasets.Value("int64")}),
            format="numpy",
        )

    def _download_and_prepare(self, dl_manager: Any) -> None:
        # `evaluate` reads the imports at the top of this file and tells people to "pip install" what is missing, which
        # for `eval` would be a stranger's package. Imported here, it is missed while loading, with the right advice.
        try:
            from eval import ranks
        except ImportError as error:
            raise ImportError(
                "image_text_recall is scored by eval/ranks.py of the M2-Encoder repository, which cannot be imported "
                "here. Start Python in the root of a clone, or set PYTHONPATH to it. (There is nothing to pip install.)"
            ) from error
        self._ranks = ranks

    def _compute(self, *, text_to_image: Any, image_embeds: Any = None, text_embeds: Any = None) -> dict[str, float]:
        if image_embeds is None or text_embeds is None:
            raise ValueError("compute needs image_embeds=[N, d] and text_embeds=[M, d] beside text_to_image.")
        images, texts = torch.as_tensor(image_embeds), torch.as_tensor(text_embeds)
        ranks = self._ranks.retrieval_ranks(images, texts, np.asarray(text_to_image))
        recalls = {k: ranks.recall(k) for k in self._ranks.RECALL_AT}
        return {
            **{f"text_to_image_R@{k}": recall.text_to_image for k, recall in recalls.items()},
            **{f"image_to_text_R@{k}": recall.image_to_text for k, recall in recalls.items()},
            "mean_recall": ranks.mean_recall(),
        }
