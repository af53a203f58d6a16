"""A client that is made from nothing but the OpenAPI schema: a method for each operation, whose answers are checked by the schema.

No generator of clients is among the dependencies, so the client is made here.
"""

import base64
import re
import types
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import pytest
from fastapi.testclient import TestClient
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from ray_distill.serve import create_app
from ray_distill.student import Student

SCHEMA = "urn:openapi"


def generate(schema: dict[str, Any], http: httpx.Client) -> types.SimpleNamespace:
    """Return a client with one function for each operation, named by its ``operationId``.

    A function takes the parameters of the operation by name, and ``media_type`` and ``body`` where it has a body. It refuses what the
    schema does not allow, checks status, headers, media type and content of the answer, and returns it.
    """
    resource = DRAFT202012.create_resource(schema)
    registry: Registry[Any] = Registry().with_resource(SCHEMA, resource)

    def check(value: Any, part: dict[str, Any]) -> None:
        # The parts refer to "#/components/...", so they need the address of the whole schema.
        located = {"$id": SCHEMA, "components": schema["components"], **part}
        jsonschema.Draft202012Validator(located, registry=registry).validate(value)

    def function(method: str, path: str, operation: dict[str, Any]) -> Callable[..., httpx.Response]:
        parameters = {item["name"]: item["schema"] for item in operation.get("parameters", ())}
        contents = operation.get("requestBody", {}).get("content", {})

        def call(*, media_type: str = "", body: Any = None, **given: Any) -> httpx.Response:
            for name, value in given.items():
                check(value, parameters[name])
            options: dict[str, Any] = {"params": given}
            if media_type == "application/json":
                check(body, contents[media_type]["schema"])
                options["json"] = body
            elif media_type == "multipart/form-data":
                assert contents[media_type]["schema"]["required"] == list(body)
                options["files"] = [(name, file) for name, files in body.items() for file in files]
            elif media_type:
                assert contents[media_type]["schema"]["format"] == "binary"
                options |= {"content": body, "headers": {"content-type": media_type}}
            of_path = {name: parameters[name]["examples"][0] for name in re.findall(r"\{(\w+)\}", path)}
            answer = http.request(method, path.format(**of_path), **options)
            described = operation["responses"][str(answer.status_code)]
            assert described.get("headers", {}).keys() <= {*answer.headers, "traceparent"}, described
            kind = answer.headers["content-type"].partition(";")[0]
            if "content" in described:
                part = described["content"][kind]["schema"]
                if kind == "application/json":
                    check(answer.json(), part)
            return answer

        return call

    return types.SimpleNamespace(
        **{
            operation["operationId"]: function(method, path, operation)
            for path, operations in schema["paths"].items()
            for method, operation in operations.items()
        }
    )


@pytest.fixture(scope="module")
def http(student: Student) -> TestClient:
    return TestClient(create_app(student, name="tiny"))


@pytest.fixture(scope="module")
def schema(http: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def test_every_operation_answers_its_examples_as_described(http: TestClient, schema: dict[str, Any]) -> None:
    client, called = generate(schema, http), 0
    for operations in schema["paths"].values():
        for operation in operations.values():
            call = getattr(client, operation["operationId"])
            bodies = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("examples", {})
            for example in bodies.values():
                assert call(media_type="application/json", body=example["value"]).status_code == 200
            if not bodies:
                assert call().status_code == 200
            called += max(1, len(bodies))
    assert called == 10


def test_every_choice_of_a_parameter_and_every_body_is_answered(http: TestClient, schema: dict[str, Any]) -> None:
    client = generate(schema, http)
    operation = schema["paths"]["/v1/features"]["post"]
    call = getattr(client, operation["operationId"])
    content = operation["requestBody"]["content"]
    audio = base64.b64decode(content["application/json"]["examples"]["one file"]["value"]["input"])
    for media_type in content.keys() - {"application/json", "multipart/form-data"}:
        assert call(media_type=media_type, body=audio).status_code == 200
    assert len(call(media_type="multipart/form-data", body={"file": [audio, audio]}).json()["data"]) == 2
    choices = 0
    for parameter in operation["parameters"]:
        options = [parameter["schema"], *parameter["schema"].get("anyOf", ())]
        for value in [value for option in options for value in option.get("enum", ())]:
            answer = call(media_type="audio/wav", body=audio, **{parameter["name"]: value})
            assert answer.status_code == 200
            choices += 1
    assert choices == 12  # 2 spaces, 2 names of layers, 6 formats and 2 data types.


def test_refusals_are_as_described(http: TestClient, schema: dict[str, Any]) -> None:
    call = getattr(generate(schema, http), schema["paths"]["/v1/features"]["post"]["operationId"])
    for body, given, status in (
        (b"x", {}, 400),
        (b"", {}, 400),
        (b"x", {"layer": 9}, 422),
        (b"x", {"model": "no"}, 404),
    ):
        answer = call(media_type="audio/wav", body=body, **given)
        assert answer.status_code == status and answer.json()["error"]
    with pytest.raises(jsonschema.ValidationError):
        call(media_type="application/json", body={"input": 1})
    with pytest.raises(jsonschema.ValidationError):
        call(media_type="audio/wav", body=b"x", format="xml")
