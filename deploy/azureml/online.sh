#!/usr/bin/env bash
# An online endpoint, one deployment, one request, the pictures.
#   SUBSCRIPTION=… RESOURCE_GROUP=… WORKSPACE=… [PROFILE=fast] [MACHINE=…] ./online.sh
source "$(dirname "$0")/common.sh"
machine inference Standard_NC6s_v3
prepare
if [ "$PROFILE" = fast ]; then azure environment create --file environment-server.yml; fi

azure online-endpoint create --file online-endpoint.yml
azure online-deployment create --all-traffic \
  --file "$(python3 machines.py --profile "$PROFILE" --get online)" --set instance_type="$MACHINE"
azure online-endpoint invoke --name safelight-online --request-file data/request.json \
  --output json >answer.json
python3 pictures.py answer.json

echo "When you are done: az ml online-endpoint delete --name safelight-online --yes"
