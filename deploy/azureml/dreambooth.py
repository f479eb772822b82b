"""A DreamBooth job, and its model registered: as dreambooth.sh, in Python."""

from __future__ import annotations

from azure.ai.ml import load_compute, load_job
from azure.ai.ml.entities import Model
from workspace import HERE, client, machine, prepare


def main() -> None:
    """Train on ``data/dog``, on MACHINE."""
    size = machine("finetune", "Standard_ND40rs_v2")
    ml = client()
    prepare(ml)

    compute = load_compute(HERE / "compute.yml")
    compute.size = size
    ml.compute.begin_create_or_update(compute).result()
    job = ml.jobs.create_or_update(load_job(HERE / "dreambooth-job.yml"))
    ml.jobs.stream(job.name)
    path = f"azureml://jobs/{job.name}/outputs/trained_model"
    ml.models.create_or_update(Model(name="dreambooth", type="custom_model", path=path))


if __name__ == "__main__":
    main()
