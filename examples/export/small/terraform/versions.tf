# Made by: diffplan export plan.json --to kubernetes --to autoscaling --to prometheus --to terraform --to json --to csv --cluster cluster.yaml --check-pods --out DIR
# Plan: 0e09fc74c60b3c47b2f67810b2746ac848e7083b7b72b200e4e0227e61156856 (scenario small, diffplan 0.1.0)
# Profile: h200, id 6867315daed3
# Prices: 2026-11, 2026-11-22, 3.5 USD per GPU-hour (on_demand)
terraform {
  required_version = ">= 1.3"
}
