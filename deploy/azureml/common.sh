# Sourced by the samples: where to work, and what is shared.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
: "${SUBSCRIPTION:?the subscription id}" "${RESOURCE_GROUP:?the resource group}" "${WORKSPACE:?the workspace}"
PROFILE=${PROFILE:-fp32} # or fast
export MSYS_NO_PATHCONV=1

azure() { # az ml, in the workspace
  az ml "$@" --subscription "$SUBSCRIPTION" --resource-group "$RESOURCE_GROUP" --workspace-name "$WORKSPACE"
}

machine() { # $1: inference or finetune; $2: the default
  MACHINE=${MACHINE:-$2}
  python3 machines.py --check "$MACHINE" --for "$1"
}

prepare() { # the environment and the model, once
  test -d environment/dist || ./package.sh
  azure environment create --file environment.yml
  azure model show --name stable-diffusion-v1-5 --label latest >/dev/null 2>&1 ||
    azure model create --file model.yml
}
