# Merge the problems that preflight found on the nodes: each line once, with the nodes that have it. Logs without a line
# of that form (no Python there, no answer in time) are shown by their last lines.
FNR == 1 { node = FILENAME; sub(/.*_/, "", node); sub(/\.log$/, "", node); files[node] = FILENAME }
/^  [^ ].* = .*: / {
  if (!($0 in where)) order[++count] = $0
  if (where[$0] !~ "(^| )" node "( |$)") { where[$0] = where[$0] (where[$0] == "" ? "" : " ") node; on[$0]++ }
  found[node] = 1
}
{ last[node, ++lines[node]] = $0 }
END {
  for (i = 1; i <= count; i++)
    print order[i] (nodes > 1 ? "  [" (on[order[i]] == nodes ? "every node" : "node " where[order[i]]) "]" : "")
  if (count) exit
  for (node in files) {
    print "  node " node " gave no reason; its log ends with:"
    for (i = (lines[node] > 15 ? lines[node] - 14 : 1); i <= lines[node]; i++) print "    " last[node, i]
  }
  if (!length(files)) print "  no node answered: srun could not start there"
}
