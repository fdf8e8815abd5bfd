# Made by: diffplan export plan.json --to all --cluster cluster.yaml --out DIR
# Plan: 26fc2cd640c0daab2596416faf42e1606afe38d9344b65e27ab370dc0ff50dd3 (scenario small, diffplan 0.1.0)
# Profile: h200, id 409aa56d2094
# Prices: 2026-11, 2026-11-22, 3.5 USD per GPU-hour (on_demand)
terraform {
  required_version = ">= 1.3"
}
