"""The parameters of a request, beside its messages: the answer's schema, the prompt's cache, and the dataset's own."""

from inspect import signature
from typing import TYPE_CHECKING, Any

from tagger.dataset import Dataset
from tagger.prompt import response_format
from tagger.spec import spec_id

if TYPE_CHECKING:
    from openai import OpenAI


def request_options(client: "OpenAI", dataset: Dataset, *, together: bool = False) -> dict[str, Any]:
    """Return the request's parameters as the SDK takes them: those it does not know go into the body as they are.

    So does the answer's schema, which the SDK would go through value by value in each call. `together` is the form for
    several texts.
    """
    params: dict[str, Any] = {"response_format": response_format(dataset, together=together)}
    params |= _cache_key(client, dataset) | dataset.llm.params
    known = signature(client.chat.completions.create).parameters.keys() - {"response_format"}
    options = {k: v for k, v in params.items() if k in known}
    own = {k: v for k, v in params.items() if k not in known}
    return {**options, "extra_body": {**own, **options.get("extra_body", {})}}


def _cache_key(client: "OpenAI", dataset: Dataset) -> dict[str, str]:
    """Return the parameter that sends requests with one prompt to where OpenAI has it cached.

    Other servers may answer 400 to it. So does Azure for the models of others that it serves under one host.
    """
    is_openai = f".{client.base_url.host}".endswith(".openai.com")
    return {"prompt_cache_key": spec_id(dataset)} if is_openai else {}
