"""A batch endpoint over a folder of tables: as batch.sh, in Python."""

from __future__ import annotations

from azure.ai.ml import Input, load_batch_deployment, load_batch_endpoint, load_compute
from workspace import HERE, client, machine, prepare, profile


def main() -> None:
    """Deploy PROFILE on MACHINE, score ``data/prompts``, fetch pictures and predictions.csv."""
    size = machine("inference", "Standard_NC6s_v3")
    ml = client()
    prepare(ml)

    compute = load_compute(HERE / "compute.yml")
    compute.size = size
    ml.compute.begin_create_or_update(compute).result()
    endpoint = load_batch_endpoint(HERE / "batch-endpoint.yml")
    ml.batch_endpoints.begin_create_or_update(endpoint).result()
    deployment = load_batch_deployment(profile("batch"))
    ml.batch_deployments.begin_create_or_update(deployment).result()

    job = ml.batch_endpoints.invoke(
        endpoint_name=endpoint.name,
        deployment_name=deployment.name,
        input=Input(type="uri_folder", path=str(HERE / "data" / "prompts")),
    )
    ml.jobs.stream(job.name)
    ml.jobs.download(job.name, download_path=str(HERE / "generated"), all=True)


if __name__ == "__main__":
    main()
