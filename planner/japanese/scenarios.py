"""What the scenarios that come with this project say of themselves."""

SENTENCES = {
    "A provider's SDXL service at about 30 GPUs: Katz service B (synthetic, after the published figures), most requests with one or two ControlNets and a LoRA.": "GPU 30台ほどの事業者のSDXLサービス。KatzのサービスB（公表値に基づく合成）で、ほとんどのリクエストがControlNet 1〜2個とLoRA 1個を使います。",
    "The traffic of 'provider' with a promise that in-line ControlNets cannot keep: three seconds an image. What does that cost?": "providerのトラフィックに、ControlNetを同じGPUで動かすと守れない目標（画像1枚3秒）を課した場合。費用はどうなるでしょうか。",
    "Half of the requests of half a sample hour of Katz service A (synthetic, after the published figures): nearly every request with one or two ControlNets and two LoRAs. A few GPUs; plans in seconds.": "KatzのサービスA（公表値に基づく合成）の1時間分の前半から半数のリクエスト。ほぼすべてがControlNet 1〜2個とLoRA 2個を使います。GPU数台、計画は数秒で終わります。",
    "Alibaba GenTD26 as logged, 86 checkpoints, up to 8 images a request, no ControlNets.": "Alibaba GenTD26の記録そのもの。チェックポイント86個、1件あたり画像8枚まで、ControlNetはありません。",
    "A hundred copies of Alibaba GenTD26, each shifted by whole days and some minutes; the busiest day of the sum.": "Alibaba GenTD26を日単位と数分ずつずらして100個重ね、その合計で最も混む1日。",
    "Katz service A (synthetic, after the published figures): nearly every request with one or two ControlNets and two LoRAs. The published 20 days at their own rate.": "KatzのサービスA（公表値に基づく合成）。ほぼすべてがControlNet 1〜2個とLoRA 2個を使います。公表された20日間を元の頻度で。",
    "Katz service A (synthetic, after the published figures): nearly every request with one or two ControlNets and two LoRAs. All requests of 20 days in 4.8 hours, a hundred times their rate.": "KatzのサービスA（公表値に基づく合成）。ほぼすべてがControlNet 1〜2個とLoRA 2個を使います。20日分の全リクエストを4.8時間に詰めた100倍の頻度。",
    "Katz service B (synthetic, after the published figures): most requests with one or two ControlNets and a LoRA. The published 20 days at their own rate.": "KatzのサービスB（公表値に基づく合成）。ほとんどのリクエストがControlNet 1〜2個とLoRA 1個を使います。公表された20日間を元の頻度で。",
    "Katz service B (synthetic, after the published figures): most requests with one or two ControlNets and a LoRA. All requests of 20 days in 4.8 hours, a hundred times their rate.": "KatzのサービスB（公表値に基づく合成）。ほとんどのリクエストがControlNet 1〜2個とLoRA 1個を使います。20日分の全リクエストを4.8時間に詰めた100倍の頻度。",
    "A provider's SDXL service at about 30 GPUs: Katz service B (synthetic, after the published figures), most requests with one or two ControlNets and a LoRA. H200 and H100 as measured against L40S and A100 as assumed, alone and with ControlNet workers on another kind.": "GPU 30台ほどの事業者のSDXLサービス。KatzのサービスB（公表値に基づく合成）。実測のH200・H100と仮定のL40S・A100を、単独とControlNetワーカーだけ別種類の場合で比べます。",
}
