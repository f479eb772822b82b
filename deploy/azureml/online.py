"""An online endpoint, one deployment, one request, the pictures: as online.sh, in Python."""

from __future__ import annotations

import pictures
from azure.ai.ml import load_online_deployment, load_online_endpoint
from workspace import HERE, client, machine, prepare, profile


def main() -> None:
    """Deploy PROFILE on MACHINE, and ask it."""
    size = machine("inference", "Standard_NC6s_v3")
    ml = client()
    prepare(ml)

    endpoint = load_online_endpoint(HERE / "online-endpoint.yml")
    ml.online_endpoints.begin_create_or_update(endpoint).result()
    deployment = load_online_deployment(profile("online"))
    deployment.instance_type = size
    ml.online_deployments.begin_create_or_update(deployment).result()
    endpoint.traffic = {deployment.name: 100}
    ml.online_endpoints.begin_create_or_update(endpoint).result()

    request = str(HERE / "data" / "request.json")
    answer = ml.online_endpoints.invoke(endpoint_name=endpoint.name, request_file=request)
    (HERE / "answer.json").write_text(answer, encoding="utf-8")
    pictures.main(str(HERE / "answer.json"))


if __name__ == "__main__":
    main()
