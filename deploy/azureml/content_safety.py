"""Both endpoints with Azure AI Content Safety: as content_safety.sh, in Python."""

from __future__ import annotations

import os

import pictures
from azure.ai.ml import (
    Input,
    load_batch_deployment,
    load_batch_endpoint,
    load_compute,
    load_online_deployment,
    load_online_endpoint,
)
from workspace import HERE, client, machine, prepare


def main() -> None:
    """Deploy with CONTENT_SAFETY_ENDPOINT and CONTENT_SAFETY_KEY, and ask both."""
    names = ("CONTENT_SAFETY_ENDPOINT", "CONTENT_SAFETY_KEY")
    secrets = {name: os.environ[name] for name in names}
    size = machine("inference", "Standard_NC6s_v3")
    ml = client()
    prepare(ml)

    endpoint = load_online_endpoint(HERE / "online-endpoint.yml")
    ml.online_endpoints.begin_create_or_update(endpoint).result()
    deployment = load_online_deployment(HERE / "online-deployment-safe.yml")
    deployment.instance_type = size
    deployment.environment_variables.update(secrets)
    ml.online_deployments.begin_create_or_update(deployment).result()
    request = str(HERE / "data" / "request.json")
    answer = ml.online_endpoints.invoke(
        endpoint_name=endpoint.name, deployment_name=deployment.name, request_file=request
    )
    (HERE / "answer.json").write_text(answer, encoding="utf-8")
    pictures.main(str(HERE / "answer.json"))

    compute = load_compute(HERE / "compute.yml")
    compute.size = size
    ml.compute.begin_create_or_update(compute).result()
    batch = load_batch_endpoint(HERE / "batch-endpoint.yml")
    ml.batch_endpoints.begin_create_or_update(batch).result()
    safe = load_batch_deployment(HERE / "batch-deployment-safe.yml")
    safe.settings.environment_variables.update(secrets)
    ml.batch_deployments.begin_create_or_update(safe).result()
    ml.batch_endpoints.invoke(
        endpoint_name=batch.name,
        deployment_name=safe.name,
        input=Input(type="uri_folder", path=str(HERE / "data" / "prompts")),
    )


if __name__ == "__main__":
    main()
