# Made by: diffplan export plan.json --to all --cluster cluster.yaml --out DIR
# Plan: 1b9c6baad655d8e2a92954d3a5eabfa92230b04b449d03f656be3caacbeab826 (scenario small, diffplan 0.1.0)
# Profile: h200, id 9fc708caece4
# Prices: 2026-11, 2026-11-22, 3.5 USD per GPU-hour (on_demand)
terraform {
  required_version = ">= 1.3"
}
