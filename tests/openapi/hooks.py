"""Two rules for schemathesis in the place of its own, which know what is right with us: see refusals.txt."""

import json
import pathlib
import re

import schemathesis
from schemathesis.specs.openapi.checks import negative_data_rejection

LISTED = [
    re.compile(line, re.DOTALL)
    for line in pathlib.Path(__file__).with_name("refusals.txt").read_text().splitlines()
    if line and not line.startswith("#")
]

# Fields whose values are objects.
OBJECTS = {"rate_limiter", "rx_rate_limiter", "tx_rate_limiter", "bandwidth", "ops"}


@schemathesis.check
def refused_for_a_listed_reason(ctx, response, case):
    """What is of the document's shape is done, or refused for a reason that is listed."""
    if response.status_code < 400 or case.meta is None or not case.meta.generation.mode.is_positive:
        return
    said = json.loads(response.content)["fault_message"]
    refusal = f"{case.method} {case.path}: {said}"
    if not any(listed.fullmatch(refusal) for listed in LISTED):
        raise AssertionError(f"not in refusals.txt: {refusal}")


@schemathesis.check
def what_is_of_another_shape_is_refused(ctx, response, case):
    """As schemathesis has it, but for lists: Firecracker, too, takes one for an object whose fields it has in their order."""
    if not list_for_object(case.body):
        negative_data_rejection(ctx, response, case)


def list_for_object(body):
    if isinstance(body, list):
        return True
    if not isinstance(body, dict):
        return False
    return any(list_for_object(value) for key, value in body.items() if key in OBJECTS)
