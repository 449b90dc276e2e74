"""What every other room stands on: prefixes, codes, plans, ranks, records. numpy only, imports nothing else of ours."""
