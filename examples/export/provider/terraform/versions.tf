# WARNING: grown: 27 GPUs in place of the plan's 26, which would not keep the promise with a queue on each node; expected figures and thresholds are the plan's
# Made by: diffplan export plan.json --to all --cluster cluster.yaml --grow --out DIR
# Plan: 89acc3b24e8b9f4fd1ba13d6061e5a82a7bef01c6f3cabdd09d1355c9cc9de0c (scenario provider, diffplan 0.1.0)
# Profile: h200, id baf5f29d40c1
# Prices: 2026-11, 2026-11-22, 3.5 USD per GPU-hour (on_demand)
terraform {
  required_version = ">= 1.3"
}
