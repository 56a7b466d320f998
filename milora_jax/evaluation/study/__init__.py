"""The comparisons of the MiLoRA paper, table by table, on equal terms: cells, statistics, report."""
