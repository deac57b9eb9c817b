#!/bin/sh
# SPACE_HOST is what a Space is called by. Its variables: GENKIT_MODEL; GENKIT_API_KEY, better a secret.
set -eu
[ -n "${GENKIT_API_KEY:-}" ] || set -- --no-key
exec genkit serve --host 0.0.0.0 --port 7860 --model "${GENKIT_MODEL:-emoji}" \
  --allow-host "$SPACE_HOST" --framed-by https://huggingface.co "$@"
