#!/usr/bin/env bash
# Write .env: .env.example with a random value for each secret of our own. OPENAI_API_KEY stays to be filled in.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -e .env ]; then
  echo "deploy/make-env.sh: .env is there already; nothing changed" >&2
  exit 2
fi
umask 077
while IFS= read -r line; do
  case $line in
    OPENAI_*) ;;
    AIRFLOW_FERNET_KEY=) line+=$(openssl rand -base64 32 | tr '+/' '-_') ;;
    [A-Z]*=) line+=$(openssl rand -hex 32) ;;
  esac
  printf '%s\n' "$line"
done <.env.example >.env
echo "Wrote .env. Fill in OPENAI_API_KEY; the user interface's password is AIRFLOW_ADMIN_PASSWORD."
