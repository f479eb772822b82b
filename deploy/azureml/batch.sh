#!/usr/bin/env bash
# A batch endpoint over a folder of tables; downloads pictures and predictions.csv.
#   SUBSCRIPTION=… RESOURCE_GROUP=… WORKSPACE=… [PROFILE=fast] [MACHINE=…] ./batch.sh
source "$(dirname "$0")/common.sh"
machine inference Standard_NC6s_v3
prepare

azure compute create --file compute.yml --size "$MACHINE"
azure batch-endpoint create --file batch-endpoint.yml
azure batch-deployment create --set-default \
  --file "$(python3 machines.py --profile "$PROFILE" --get batch)"
JOB=$(azure batch-endpoint invoke --name safelight-batch \
  --input data/prompts --input-type uri_folder --query name --output tsv)
azure job stream --name "$JOB"
azure job download --name "$JOB" --download-path generated

echo "When you are done: az ml batch-endpoint delete --name safelight-batch --yes"
