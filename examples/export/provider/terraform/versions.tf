# WARNING: grown: 27 GPUs in place of the plan's 26, which would not keep the promise with a queue on each node; expected figures and thresholds are the plan's
# Made by: diffplan export plan.json --to all --cluster cluster.yaml --grow --out DIR
# Plan: c39515cb64aace5ae1fa592f88b77bf79d9071c25969048864578c17d19f6338 (scenario provider, diffplan 0.1.0)
# Profile: h200, id 9fc708caece4
# Prices: 2026-11, 2026-11-22, 3.5 USD per GPU-hour (on_demand)
terraform {
  required_version = ">= 1.3"
}
