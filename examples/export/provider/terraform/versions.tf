# Made by: diffplan export plan.json --to all --cluster cluster.yaml --grow --out DIR
# Plan: 9ee9dfee81c9d971c59920f860eafe99d7e91f2940a2f543ece9213e2e120e4c (scenario provider, diffplan 0.1.0)
# Profile: h200, id 409aa56d2094
# Prices: 2026-11, 2026-11-22, 3.5 USD per GPU-hour (on_demand)
terraform {
  required_version = ">= 1.3"
}
