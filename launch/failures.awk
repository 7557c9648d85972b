# One line for each failed rank of torchrun's report ("Root Cause"): the key to sort by, a tab, then what a human needs.
# Ranks that only lost their peers come after the one they lost; the order of time decides the rest.
function report() {
  if (rank == "") return
  what = last[rank] != "" ? last[rank] : "exit code " code
  peer = what ~ /onnection (was )?(closed|reset|refused)|DistBackendError|DistNetworkError|NCCL|[Tt]imed out|Broken pipe|exit code -15/
  printf "%d %s\t  rank %s on %s, exit code %s: %s (%s)\n", peer, time, rank, host, code, what, file
  rank = ""
}
FNR == 1 { report(); root = 0; delete last }
/^\[rank[0-9]+\]: [^ ]/ { key = $1; gsub(/[^0-9]/, "", key); text = $0; sub(/^[^ ]* /, "", text); last[key] = text }
/^watchdog: rank [0-9]+ on [^ ]+: / { key = $3; text = $0; sub(/^[^:]*: [^:]*: /, "", text); last[key] = text }
/^Fatal Python error/ { crash = $0 }
/^Root Cause/ { root = 1; file = FILENAME }
root && /^ *time *:/ { time = $3 }
root && /^ *host *:/ { host = $3 }
root && /^ *rank *:/ { rank = $3 }
root && /^ *exitcode *:/ { code = $3; if (last[rank] == "" && crash != "") last[rank] = crash; crash = "" }
END { report() }
