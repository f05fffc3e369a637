"""Scorers that are language models behind an OpenAI-compatible server: UnifiedReward, VisualQuality-R1.

The picture goes as a PNG in a data URL, the answer is text, and the score is the number in it. The questions
here are our own words; scale and form of the answer are the published ones. To repeat published numbers, pass
the published question.
"""

import base64
import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import torch
from PIL import Image

from dina_lrm.core.tensors import Score
from dina_lrm.errors import InvalidInputError, MissingComponentError
from dina_lrm.evaluation.baselines.scorer import checked_pairs, picture
from dina_lrm.remote.transport import retrying_transport

__all__ = ["UNIFIED_REWARD", "VISUAL_QUALITY_R1", "Question", "ServerScorer"]

_QUOTED = 300
_NUMBER = r"([-+]?\d+(?:\.\d+)?)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked about a picture, and how the answer is read."""

    name: str
    """Name of the scorer, as in `SCORERS`."""
    template: str
    """The text sent; every {prompt} in it is replaced by the prompt."""
    answer: str
    """Regular expression around the number, its first group; the last match in the reply counts."""
    low: float
    """Smallest score that is an answer."""
    high: float
    """Largest one."""

    def read(self, reply: str) -> float:
        """The number in a reply: where `answer` finds it, or all there is.

        Raises:
            InvalidInputError: no number, or one outside [low, high]; it quotes the reply.

        >>> VISUAL_QUALITY_R1.read("<think>sharp, 2 cats</think><answer>4.25</answer>")
        4.25
        """
        said = reply.rpartition("</think>")[2]
        alone = re.fullmatch(rf"\s*{_NUMBER}\s*", said)
        found = re.findall(self.answer, said, re.IGNORECASE) or ([alone[1]] if alone else [])
        if not found:
            raise InvalidInputError(f"{self.name}: no score in the reply {_quoted(reply)}")
        if not self.low <= float(found[-1]) <= self.high:
            allowed = f"[{self.low:g}, {self.high:g}]"
            raise InvalidInputError(
                f"{self.name}: {found[-1]} is not in {allowed} in the reply {_quoted(reply)}"
            )
        return float(found[-1])


UNIFIED_REWARD = Question(
    name="unified-reward",
    template=(
        "A picture was generated from a caption. Judge how well it shows what the caption says: objects, "
        "attributes and relations; and how good it is as a picture: clarity, detail, colour, beauty. "
        "Then give one score from 1 (worst) to 5 (best) after 'Final Score:'.\nCaption: {prompt}"
    ),
    answer=rf"final score:[\s*]*{_NUMBER}",
    low=1.0,
    high=5.0,
)
"""Text alignment and quality, 1 to 5: arXiv:2503.05236."""

VISUAL_QUALITY_R1 = Question(
    name="visualquality-r1",
    template=(
        "How good is the visual quality of this picture? Answer with a number between 1 (very poor) and 5 "
        "(excellent), with two decimals, in <answer> </answer> tags."
    ),
    answer=rf"<answer>\s*{_NUMBER}\s*</answer>",
    low=1.0,
    high=5.0,
)
"""Quality of the picture alone, 1 to 5; the prompt is not sent: arXiv:2505.14460."""


class ServerScorer:
    """Asks a server about every pair, a few at a time.

    Deterministic as far as the server is: temperature 0 and a fixed seed are asked for. What a server batches
    together is its own affair.

    Args:
        base_url: "http://host:8000", with or without /v1.
        model: the name the server knows it by.
        question: see `Question`.
        api_key: sent as a bearer token.
        concurrency: requests under way at once.
        num_retries: after what may pass, as `dina_lrm.remote.client` has it.
        backoff_seconds: longest wait before the first retry; doubled each time.
        timeout_seconds: of one request.
        max_tokens: of a reply.

    Raises:
        InvalidInputError: an address that is not http(s), or a setting out of range.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        question: Question,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        num_retries: int = 5,
        backoff_seconds: float = 0.5,
        timeout_seconds: float = 120.0,
        max_tokens: int = 2048,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise InvalidInputError(f"base_url must start with http:// or https://, not {base_url!r}")
        if concurrency < 1 or num_retries < 0:
            raise InvalidInputError(
                f"concurrency = {concurrency} must be at least 1, num_retries = {num_retries} at least 0"
            )
        self.url = base_url.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self.model = model
        self.question = question
        self.name = question.name
        self.api_key = api_key
        self.concurrency = concurrency
        self.num_retries = num_retries
        self.backoff_seconds = backoff_seconds
        self.timeout_seconds = timeout_seconds
        self.max_tokens = max_tokens

    def score(self, prompts: Sequence[str], images: Sequence[Any]) -> Score:
        """See `Scorer.score`.

        Raises:
            InvalidInputError: also for a request the server refuses and a reply without a score.
            MissingComponentError: no answer, retries included.
        """
        pairs = checked_pairs(prompts, images)
        transport = retrying_transport(self.url, self.num_retries, backoff_seconds=self.backoff_seconds)
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        with httpx.Client(transport=transport, headers=headers, timeout=self.timeout_seconds) as client:
            pool = ThreadPoolExecutor(self.concurrency)
            try:
                jobs = []
                for index, (prompt, image) in enumerate(pairs):
                    if isinstance(image, Image.Image):  # may be given twice: not to be read by two threads
                        image = picture(image, index)
                    jobs.append(pool.submit(self._score_pair, client, prompt, image, index))
                return torch.tensor([job.result() for job in jobs], dtype=torch.float32)
            finally:
                pool.shutdown(cancel_futures=True)

    def _score_pair(self, client: httpx.Client, prompt: str, image: Any, index: int) -> float:
        content = [
            {"type": "image_url", "image_url": {"url": _data_url(picture(image, index))}},
            {"type": "text", "text": self.question.template.replace("{prompt}", prompt)},
        ]
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": self.max_tokens,
        }
        return self.question.read(self._reply(self._post(client, request)))

    def _reply(self, response: httpx.Response) -> str:
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise InvalidInputError(f"{self.url} sent no chat completion but {_quoted(response.text)}")
        return content

    def _post(self, client: httpx.Client, request: dict[str, Any]) -> httpx.Response:
        attempts = f"{self.num_retries + 1} attempts"
        try:
            response = client.post(self.url, json=request)
        except httpx.RequestError as error:
            problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise MissingComponentError(
                f"no answer from {self.url} in {attempts}, last: {problem}"
            ) from error
        if response.status_code == 200:
            return response
        problem = f"HTTP {response.status_code} {_quoted(response.text)}"
        if response.extensions["retry"].is_retryable_status_code(response.status_code):
            raise MissingComponentError(f"no answer from {self.url} in {attempts}, last: {problem}")
        raise InvalidInputError(f"{self.url} refused the request: {problem}")


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= _QUOTED else text[:_QUOTED] + " ...")
