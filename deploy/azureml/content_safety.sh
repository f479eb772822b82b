#!/usr/bin/env bash
# Both endpoints with Azure AI Content Safety before and after generation.
#   CONTENT_SAFETY_ENDPOINT=https://… CONTENT_SAFETY_KEY=… SUBSCRIPTION=… … ./content_safety.sh
source "$(dirname "$0")/common.sh"
: "${CONTENT_SAFETY_ENDPOINT:?the service}" "${CONTENT_SAFETY_KEY:?its key}"
machine inference Standard_NC6s_v3
prepare

azure online-endpoint create --file online-endpoint.yml
azure online-deployment create --all-traffic --file online-deployment-safe.yml \
  --set instance_type="$MACHINE" \
  environment_variables.CONTENT_SAFETY_ENDPOINT="$CONTENT_SAFETY_ENDPOINT" \
  environment_variables.CONTENT_SAFETY_KEY="$CONTENT_SAFETY_KEY"
azure online-endpoint invoke --name safelight-online --request-file data/request.json \
  --output json >answer.json
python3 pictures.py answer.json

azure compute create --file compute.yml --size "$MACHINE"
azure batch-endpoint create --file batch-endpoint.yml
azure batch-deployment create --set-default --file batch-deployment-safe.yml \
  --set settings.environment_variables.CONTENT_SAFETY_ENDPOINT="$CONTENT_SAFETY_ENDPOINT" \
  settings.environment_variables.CONTENT_SAFETY_KEY="$CONTENT_SAFETY_KEY"
azure batch-endpoint invoke --name safelight-batch --input data/prompts --input-type uri_folder
