#!/usr/bin/env bash
# A DreamBooth job; its model is registered, ready for an online deployment.
#   SUBSCRIPTION=… RESOURCE_GROUP=… WORKSPACE=… [MACHINE=…] ./dreambooth.sh
source "$(dirname "$0")/common.sh"
machine finetune Standard_ND40rs_v2
prepare

azure compute create --file compute.yml --size "$MACHINE"
JOB=$(azure job create --file dreambooth-job.yml --query name --output tsv)
azure job stream --name "$JOB"
azure model create --name dreambooth --type custom_model \
  --path "azureml://jobs/$JOB/outputs/trained_model"
